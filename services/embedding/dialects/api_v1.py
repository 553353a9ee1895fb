"""
Two services in use under /api/v1: a TEI derivative's `POST /embed`, and an E5 service's `/embeddings/…`.

The default model answers: neither has a field for the model.
"""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.http_errors import JsonRoute
from services.common.wire.api_v1 import (
    ApiEmbedReply,
    ApiEmbedRequest,
    E5BatchReply,
    E5BatchRequest,
    E5Message,
    E5Reply,
    E5Request,
)
from services.embedding.dialects.limits import check_inputs, truncate_of
from services.embedding.embedder import Embeddings, EmbedOptions
from services.embedding.outputs import json_response
from services.embedding.resources import models_of
from services.embedding.routes import lane_of

router = APIRouter(prefix="/api/v1", route_class=JsonRoute, tags=["api_v1"])


async def _embed(request: Request, texts: Sequence[str], options: EmbedOptions, field: str) -> Embeddings:
    check_inputs(request, texts, field)
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        made = await embedder.embed(
            texts,
            options,
            lane=lane_of(len(texts)),
            deadline=deadline_of(request),
            caller=caller_of(request),
            field=field,
        )
    charge_tokens(request, sum(made.tokens))
    return made


def duration(milliseconds: float) -> str:
    """Return whole microseconds below one millisecond, else whole milliseconds, with the unit: `120µs`, `35ms`."""
    return f"{milliseconds:.0f}ms" if milliseconds >= 1 else f"{min(999, round(milliseconds * 1000))}µs"


@router.post("/embed", summary="Texts to vectors, with durations", responses={200: {"model": ApiEmbedReply}})
async def embed(request: Request, body: ApiEmbedRequest) -> Response:
    """Embed one text or a list; vectors keep the order of the inputs."""
    options = EmbedOptions(
        prompt_name=body.prompt_name,
        normalize=body.normalize,
        truncate=truncate_of(request, body.truncate),
        truncation_direction=body.direction(),
        dimensions=body.dimensions,
    )
    made = await _embed(request, body.texts(), options, "inputs")
    total = sum(made.tokens)
    payload = {
        "data": [{"embedding": row, "index": index} for index, row in enumerate(made.vectors)],
        "usage": {"prompt_tokens": total, "total_tokens": total},
        "timings": {
            "tokenization": duration(made.tokenization_ms),
            "queue": duration(made.queue_ms),
            "inference": duration(made.inference_ms),
        },
    }
    return await json_response(payload, floats=made.vectors.size)


@router.post("/embeddings/embed", summary="A query to its vector", responses={200: {"model": E5Reply}})
async def embed_query(request: Request, body: E5Request) -> Response:
    """Embed one query, the model's query prompt before it."""
    made = await _embed(request, [body.text], EmbedOptions(input_type="query", truncate=truncate_of(request)), "text")
    return await json_response({"vector": made.vectors[0]}, floats=made.vectors.size)


@router.post("/embeddings/embed_batch", summary="Passages to vectors", responses={200: {"model": E5BatchReply}})
async def embed_batch(request: Request, body: E5BatchRequest) -> Response:
    """Embed passages, or queries if the request says so, the model's prompt for them before each."""
    options = EmbedOptions(input_type="query" if body.is_query else "document", truncate=truncate_of(request))
    made = await _embed(request, body.texts, options, "texts")
    return await json_response({"vectors": list(made.vectors)}, floats=made.vectors.size)


@router.get("/embeddings/", summary="Whether the service is there")
@router.get("/embeddings", include_in_schema=False)
async def message(request: Request) -> E5Message:
    """Say which model answers."""
    return E5Message(message=f"The embedding service is running; the model is {models_of(request).default}")
