"""The native HTTP routes: `/embed`, `/models`, `/info`."""

import asyncio
import base64
import time
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from services.common.app import deadline_of, resources_of
from services.common.batching import Lane
from services.common.http_errors import JsonRoute
from services.common.wire.embedding import EmbeddingInfo, EmbedReply, EmbedRequest, ModelCard, ModelList
from services.embedding.embedder import Embedder

STARTED_AT = int(time.time())
INLINE_FLOATS = 20_000  # Above this many numbers, JSON is written in a thread: it would hold up other requests.

router = APIRouter(route_class=JsonRoute, tags=["embedding"])


def embedder_of(request: Request) -> Embedder:
    """Return the embedder that *request*'s service runs."""
    embedder = resources_of(request).embedder
    assert isinstance(embedder, Embedder)
    return embedder


def lane_of(texts: int, asked: str | None = None) -> Lane:
    """Return the lane a request travels in: one text is a query that somebody waits for, several are bulk."""
    return Lane(asked) if asked else (Lane.QUERY if texts == 1 else Lane.BULK)


def encode_vectors(vectors: NDArray[np.float32], encoding: str) -> list[Any]:
    """Return each row as it goes into JSON: the array itself (orjson writes it) or base64 of little-endian float32."""
    if encoding == "base64":
        return [base64.b64encode(row.tobytes()).decode() for row in vectors]
    return list(vectors)


async def json_response(payload: dict[str, Any], *, floats: int) -> Response:
    """Write *payload*, which may hold NumPy rows, as JSON."""
    write = orjson.dumps
    if floats > INLINE_FLOATS:
        body = await asyncio.to_thread(write, payload, None, orjson.OPT_SERIALIZE_NUMPY)
    else:
        body = write(payload, None, orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")


@router.post("/embed", summary="Texts to vectors", responses={200: {"model": EmbedReply}})
async def embed(request: Request, body: EmbedRequest) -> Response:
    """Embed one text or up to 2,048; vectors keep the order of the inputs."""
    embedder = embedder_of(request)
    embedder.check_model(body.model)
    texts = body.texts()
    made = await embedder.embed(
        texts,
        lane=lane_of(len(texts), body.lane),
        deadline=deadline_of(request),
        input_type=body.input_type,
        normalize=body.normalize,
        truncate=body.truncate,
    )
    rows = zip(encode_vectors(made.vectors, body.encoding), made.tokens, made.truncated, strict=True)
    total = sum(made.tokens)
    payload = {
        "data": [
            {"index": index, "embedding": row, "tokens": tokens, "truncated": truncated}
            for index, (row, tokens, truncated) in enumerate(rows)
        ],
        "model": embedder.info.name,
        "fingerprint": embedder.info.fingerprint,
        "usage": {"prompt_tokens": total, "total_tokens": total},
        "timings": {
            "tokenization_ms": round(made.tokenization_ms, 3),
            "queue_ms": round(made.queue_ms, 3),
            "inference_ms": round(made.inference_ms, 3),
        },
    }
    return await json_response(payload, floats=made.vectors.size if body.encoding == "float" else 0)


@router.get("/models", summary="The models served here")
async def models(request: Request) -> ModelList:
    """List the models by name."""
    return ModelList(data=[ModelCard(id=embedder_of(request).info.name, created=STARTED_AT)])


@router.get("/info", summary="What runs here, and why")
async def info(request: Request) -> EmbeddingInfo:
    """Describe the model, its fingerprint, the runtime and the precision with the reason it was chosen."""
    model = embedder_of(request).info
    return EmbeddingInfo(
        model=model.name,
        fingerprint=model.fingerprint,
        dim=model.dim,
        max_tokens=model.max_tokens,
        prompts=dict(model.prompts),
        runtime=model.runtime,
        precision=model.precision,
        precision_reason=model.precision_reason,
    )
