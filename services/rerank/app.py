"""The composition root: settings to resources to the ASGI app."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fastapi import FastAPI

from services.common.app import create_service_app, make_store
from services.common.batching import DeviceTurn
from services.common.metrics import Metrics
from services.common.tracing import span
from services.rerank import routes
from services.rerank.cascade import Cascade, LastBeforeFirst
from services.rerank.dialects import error_dialects, routers
from services.rerank.metrics import RerankMetrics
from services.rerank.models import load_backends, load_blend
from services.rerank.ports import Backend
from services.rerank.reranker import Reranker
from services.rerank.score_cache import ScoreCache
from services.rerank.scorer import Scorer, ScorerLimits
from services.rerank.settings import RerankSettings
from services.rerank.shared_bytes import RedisBytes

Load = Callable[[RerankSettings], Sequence[Backend]]

REDIS_TIMEOUT_S = 0.1  # One read may be the token vectors of a hundred documents, some megabytes.
SCORES_PREFIX = b"tercet:score:"
VECTORS_PREFIX = b"tercet:token-vectors:"


@dataclass(frozen=True, slots=True)
class RerankResources:
    """What the routes work with."""

    reranker: Reranker

    def problems(self) -> Sequence[str]:
        """Return why this process should be replaced."""
        return self.reranker.problems()


@asynccontextmanager
async def build(
    settings: RerankSettings, metrics: Metrics, *, load: Load = load_backends
) -> AsyncIterator[RerankResources]:
    """Load the scorers, start them and warm them up; give everything back at the end."""
    observer = RerankMetrics(metrics)
    with span("model.load") as loading:
        loading.set({"tercet.model": settings.model})
        backends = await asyncio.to_thread(load, settings)
    async with AsyncExitStack() as stack:
        scorers = await _open_scorers(backends, settings, metrics, stack)
        for scorer in scorers:
            observer.watch(scorer.batcher)
        reranker = Reranker(
            scorers,
            await asyncio.to_thread(_cascade, scorers, settings),
            long_documents=settings.long_documents,
            observer=observer,
        )
        stack.push_async_callback(reranker.aclose)
        observer.report(reranker)
        await reranker.start()
        yield RerankResources(reranker)


async def _open_scorers(
    backends: Sequence[Backend], settings: RerankSettings, metrics: Metrics, stack: AsyncExitStack
) -> list[Scorer]:
    """Return a scorer for each backend, with the caches that they share; what those hold open is closed by *stack*."""
    scores: RedisBytes | None = None
    vectors: RedisBytes | None = None
    if settings.redis_url is not None:
        store = make_store("redis", settings.redis_url, settings, metrics, timeout_s=REDIS_TIMEOUT_S)
        stack.push_async_callback(store.aclose)
        scores = RedisBytes(store, SCORES_PREFIX, ttl_s=settings.cache_ttl_s)
        vectors = RedisBytes(store, VECTORS_PREFIX, ttl_s=settings.cache_ttl_s)
        for shared in (scores, vectors):
            stack.push_async_callback(shared.aclose)
    limits = ScorerLimits(
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_items=settings.max_queue_items,
        tokenizer_threads=settings.tokenizer_threads,
        hang_s=settings.hang_s,
        tokenized_cache_bytes=settings.tokenized_cache_bytes // len(backends),
        window_overlap_tokens=settings.window_overlap_tokens,
        max_windows=settings.max_windows,
    )
    cache = ScoreCache(settings.score_cache_bytes, scores) if settings.score_cache_bytes else None
    turn = DeviceTurn()
    return [Scorer(backend, limits, cache=cache, vectors=vectors, turn=turn) for backend in backends]


def _cascade(scorers: Sequence[Scorer], settings: RerankSettings) -> Cascade | None:
    """Return what *scorers* make together, if there are two."""
    if len(scorers) == 1:
        return None
    first, last = scorers
    blend = load_blend(settings, first.info) or LastBeforeFirst(first, last)
    return Cascade(first, last, blend, most=settings.last_stage_documents)


def create_app(settings: RerankSettings, *, load: Load = load_backends) -> FastAPI:
    """Return the rerank service's app; *load* makes the backends, in a thread."""
    return create_service_app(
        "rerank",
        settings,
        partial(build, load=load),
        [routes.router, *routers],
        description="Documents by relevance to a query: native, as Jina, Cohere v1 and vLLM under /v1, as Cohere under /v2, "
        "as TEI under /tei.",
        dialects=error_dialects,
    )
