"""OpenAI's embeddings API: `POST /v1/embeddings`, `GET /v1/models` and `GET /v1/models/{id}`."""

from typing import Any

from fastapi import APIRouter, Request, Response

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.errors import NotFound
from services.common.http_errors import JsonRoute
from services.common.wire.embedding import ModelCard, ModelList
from services.common.wire.openai import OpenAIEmbeddingReply, OpenAIEmbeddingRequest
from services.embedding.dialects.limits import check_inputs, truncate_of
from services.embedding.embedder import Embedder, Embeddings, EmbedOptions
from services.embedding.outputs import encode_vectors, json_response
from services.embedding.resources import models_of
from services.embedding.routes import STARTED_AT, lane_of

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["openai"])


async def embed_openai(
    request: Request, body: OpenAIEmbeddingRequest, embedder: Embedder
) -> tuple[Response, Embeddings]:
    """Embed what *body* asks for; return OpenAI's reply and what it was made of. Raises: As Embedder.embed."""
    inputs = body.inputs()
    check_inputs(request, inputs, "input")
    made = await embedder.embed(
        inputs,
        EmbedOptions(truncate=truncate_of(request), dimensions=body.dimensions),
        lane=lane_of(len(inputs)),
        deadline=deadline_of(request),
        caller=caller_of(request),
        field="input",
    )
    total = sum(made.tokens)
    charge_tokens(request, total)

    def payload() -> dict[str, Any]:
        rows = encode_vectors(made.vectors, body.encoding_format or "float")
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
            "model": embedder.info.name,
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }

    return await json_response(payload, floats=made.vectors.size), made


@router.post("/embeddings", summary="OpenAI-compatible embeddings", responses={200: {"model": OpenAIEmbeddingReply}})
async def embeddings(request: Request, body: OpenAIEmbeddingRequest) -> Response:
    """Embed one input or up to 2,048, texts or token ids; unit-length vectors, as floats or as base64 of float32."""
    async with models_of(request).use(body.model, deadline_of(request)) as embedder:
        response, _ = await embed_openai(request, body, embedder)
        return response


def _card(name: str) -> ModelCard:
    return ModelCard(id=name, created=STARTED_AT)


@router.get("/models", summary="OpenAI-compatible list of models")
async def list_models(request: Request) -> ModelList:
    """List the models by name."""
    return ModelList(data=[_card(name) for name in models_of(request).names()])


@router.get("/models/{name:path}", summary="OpenAI-compatible description of one model")
async def retrieve_model(request: Request, name: str) -> ModelCard:
    """Describe one model, loaded or not."""
    models = models_of(request)
    for public, others in models.aliases.items():
        if name == public or name in others:
            return _card(public)
    raise NotFound(f"There is no model {name[:100]!r}; there is: {', '.join(models.names())}", param="model")
