"""The native HTTP routes: `/embed`, `/tokenize`, `/models`, `/info`."""

import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.batching import Lane
from services.common.http_errors import JsonRoute
from services.common.wire.embedding import (
    EmbeddingInfo,
    EmbeddingModelCard,
    EmbeddingModelList,
    EmbedReply,
    EmbedRequest,
    Piece,
    TokenizedItem,
    TokenizeReply,
    TokenizeRequest,
)
from services.embedding.embedder import Embeddings, EmbedOptions
from services.embedding.outputs import (
    DTYPES,
    MSGPACK,
    encode_vectors,
    json_response,
    msgpack_response,
    raw_rows,
    scales_of,
    wants_msgpack,
)
from services.embedding.resources import embedding_of, models_of

STARTED_AT = int(time.time())

router = APIRouter(route_class=JsonRoute, tags=["embedding"])


def lane_of(texts: int, asked: str | None = None) -> Lane:
    """Return the lane a request travels in: one text is a query that somebody waits for, several are bulk."""
    return Lane(asked) if asked else (Lane.QUERY if texts == 1 else Lane.BULK)


@router.post("/embed", summary="Texts to vectors", responses={200: {"model": EmbedReply, "content": {MSGPACK: {}}}})
async def embed(request: Request, body: EmbedRequest) -> Response:
    """
    Embed one text or up to 2,048; vectors keep the order of the inputs.

    `Accept: application/msgpack` gets each vector as raw little-endian bytes, with their `dtype`.
    """
    started = time.perf_counter()
    texts = body.texts()
    resources = embedding_of(request)
    options = EmbedOptions(
        input_type=body.input_type,
        prompt_name=body.prompt_name,
        normalize=body.normalize,
        truncate=resources.settings.auto_truncate if body.truncate is None else body.truncate,
        truncation_direction=body.truncation_direction,
        dimensions=body.dimensions,
    )
    deadline = deadline_of(request)
    async with resources.models.use(body.model or body.model_name, deadline) as embedder:
        made = await embedder.embed(
            texts,
            options,
            lane=lane_of(len(texts), body.lane),
            deadline=deadline,
            caller=caller_of(request),
            field=body.field,
        )
    total = sum(made.tokens)
    charge_tokens(request, total)
    rest: dict[str, Any] = {
        "model": embedder.info.name,
        "fingerprint": made.fingerprint,
        "usage": {"prompt_tokens": total, "total_tokens": total, "cached_tokens": made.cached_tokens},
        "timings": {
            "tokenization_ms": round(made.tokenization_ms, 3),
            "queue_ms": round(made.queue_ms, 3),
            "inference_ms": round(made.inference_ms, 3),
        },
    }
    if body.wants_plain_reply:
        rest["latency_ms"] = round((time.perf_counter() - started) * 1e3, 3)
    if wants_msgpack(request):
        return await msgpack_response(_packed(made, body, rest), floats=made.vectors.size)
    return await json_response(_reply(made, body, rest), floats=made.vectors.size)


def _reply(made: Embeddings, body: EmbedRequest, rest: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        rows = encode_vectors(made.vectors, body.encoding)
        reply = {"data": _items(made, body.encoding, rows), **rest}
        if body.wants_plain_reply:
            reply["embeddings"] = rows
        return reply

    return build


def _packed(made: Embeddings, body: EmbedRequest, rest: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        items = _items(made, body.encoding, raw_rows(made.vectors, body.encoding))
        for item in items:
            item["dtype"] = DTYPES[body.encoding]
        return {"data": items, **rest}

    return build


def _items(made: Embeddings, encoding: str, rows: list[Any]) -> list[dict[str, Any]]:
    items = [
        {"index": index, "embedding": row, "tokens": tokens, "truncated": truncated}
        for index, (row, tokens, truncated) in enumerate(zip(rows, made.tokens, made.truncated, strict=True))
    ]
    if encoding == "int8":
        for item, scale in zip(items, scales_of(made.vectors).tolist(), strict=True):
            item["scale"] = scale
    return items


@router.post("/tokenize", summary="Texts to tokens")
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeReply:
    """Return every token of each text, uncut, with the characters it covers."""
    async with models_of(request).use(body.model, deadline_of(request)) as embedder:
        texts = await embedder.tokenize(
            body.texts(), add_special_tokens=body.add_special_tokens, prompt_name=body.prompt_name
        )
    return TokenizeReply(
        data=[
            TokenizedItem(
                index=index,
                tokens=[
                    Piece(id=one.id, text=one.text, special=one.special, start=one.start, stop=one.stop)
                    for one in pieces
                ],
            )
            for index, pieces in enumerate(texts)
        ],
        model=embedder.info.name,
    )


@router.get("/models", summary="The models served here")
async def models(request: Request) -> EmbeddingModelList:
    """List the models by name, with the other names that lead to them."""
    registry = models_of(request)
    loaded = {embedder.info.name for embedder in registry.loaded()}
    return EmbeddingModelList(
        data=[
            EmbeddingModelCard(
                id=name,
                created=STARTED_AT,
                default=name == registry.default,
                loaded=name in loaded,
                aliases=registry.aliases[name],
            )
            for name in registry.names()
        ]
    )


@router.get("/info", summary="What runs here, and why")
async def info(request: Request, model: str | None = None) -> EmbeddingInfo:
    """Describe a model: its fingerprint, the runtime and the precision with the reason they were chosen, the limits."""
    resources = embedding_of(request)
    settings = resources.settings
    async with resources.models.use(model, deadline_of(request)) as embedder:
        about = embedder.info
        return EmbeddingInfo(
            model=about.name,
            fingerprint=about.fingerprint,
            dim=about.dim,
            max_tokens=about.max_tokens,
            prompts=dict(about.prompts),
            runtime=about.runtime,
            precision=about.precision,
            precision_reason=about.precision_reason,
            revision=about.revision,
            device=about.device,
            pooling=about.pooling,
            dimensions="any" if embedder.any_dimensions else list(about.dimensions),
            weights_bytes=about.weights_bytes,
            measured={name: dict(figures) for name, figures in about.measured.items()},
            placement=embedder.placement.describe(),
            limits={
                "max_client_batch": settings.max_client_batch,
                "max_concurrent_requests": settings.max_concurrent_requests,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_batch_items": settings.max_batch_items,
                "max_queue_items": settings.max_queue_items,
                "tokenizer_threads": settings.tokenizer_threads,
            },
        )
