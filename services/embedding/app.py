"""The composition root: settings to resources to the ASGI app."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from services.common.app import create_service_app, make_store
from services.common.metrics import Metrics
from services.common.tracing import span
from services.embedding import routes
from services.embedding.cache import MemoryVectorCache, RedisVectorCache
from services.embedding.dialects import api_v1, openai, tei
from services.embedding.embedder import Embedder
from services.embedding.metrics import EmbeddingMetrics
from services.embedding.models import estimate_bytes, load_backends
from services.embedding.placement import BatchLimits, DeviceTurns
from services.embedding.ports import Backend, VectorCache
from services.embedding.registry import ModelRegistry
from services.embedding.resources import EmbeddingResources
from services.embedding.settings import EmbeddingSettings
from services.embedding.specs import ModelSpec, parse_specs

Load = Callable[[ModelSpec, EmbeddingSettings], Sequence[Backend]]

VECTORS_TIMEOUT_S = 0.1  # One read is the vectors of a batch, up to megabytes.


@asynccontextmanager
async def build(
    settings: EmbeddingSettings, metrics: Metrics, *, load: Load = load_backends
) -> AsyncIterator[EmbeddingResources]:
    """Load the pinned models and warm them up; give everything back at the end."""
    cache = _open_cache(settings, metrics)
    observer = EmbeddingMetrics(metrics)
    turns = DeviceTurns()
    limits = BatchLimits(
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_items=settings.max_batch_items,
        max_queue_items=settings.max_queue_items,
        sort_window=settings.sort_window,
        tokenizer_threads=settings.tokenizer_threads,
        hang_s=settings.hang_s,
    )

    async def start_model(spec: ModelSpec) -> Embedder:
        embedder = Embedder(
            await asyncio.to_thread(load, spec, settings),
            limits,
            name=spec.public_name,
            cache=cache,
            any_dimensions=spec.any_dimensions,
            max_inputs=settings.max_client_batch,
            turn_for=turns.of,
            observer=observer,
            watch=observer.watch,
        )
        try:
            await embedder.start()
        except BaseException:
            await embedder.aclose()
            raise
        return embedder

    async def open_model(spec: ModelSpec) -> Embedder:
        with span("model.load") as loading:
            loading.set({"tercet.model": spec.public_name})
            return await start_model(spec)

    models = ModelRegistry(
        parse_specs(settings.model),
        open_model,
        observer=observer,
        estimate_bytes=lambda spec: estimate_bytes(spec, settings),
        memory_bytes=settings.model_memory_bytes,
        idle_unload_s=settings.idle_unload_s,
        pin_default=settings.pin_default,
        max_concurrent_requests=settings.max_concurrent_requests,
    )
    observer.report(models)
    try:
        await models.start()
        yield EmbeddingResources(models, settings)
    finally:
        await models.aclose()
        if cache is not None:
            await cache.aclose()


def _open_cache(settings: EmbeddingSettings, metrics: Metrics) -> VectorCache | None:
    if not settings.cache_bytes:
        return None
    if settings.redis_url is None:
        return MemoryVectorCache(max_bytes=settings.cache_bytes, ttl_s=settings.cache_ttl_s)
    store = make_store("redis", settings.redis_url, settings, metrics, timeout_s=VECTORS_TIMEOUT_S)
    return RedisVectorCache(store, ttl_s=settings.cache_ttl_s)


def create_app(settings: EmbeddingSettings, *, load: Load = load_backends) -> FastAPI:
    """Return the embedding service's app; *load* makes the backends of a model, in a thread."""
    return create_service_app(
        "embedding",
        settings,
        partial(build, load=load),
        [routes.router, openai.router, tei.router, api_v1.router],
        description="Text to vectors: native, as OpenAI under /v1, as TEI under /tei, and as two plain services under /api/v1.",
        dialects={
            "/v1": "openai",
            "/tei": "tei",
            "/tei/v1": "openai",
            "/tei/embeddings": "openai",
            "/api/v1": "plain",
        },
    )
