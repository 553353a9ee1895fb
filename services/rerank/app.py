"""The composition root: settings to resources to the ASGI app."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from services.common.app import create_service_app
from services.common.batching import Lane
from services.common.batching.metrics import observe_batches
from services.common.deadline import NO_DEADLINE
from services.common.metrics import Metrics
from services.common.tracing import span
from services.rerank import routes
from services.rerank.dialects import compatible
from services.rerank.models import load_backend
from services.rerank.reranker import Reranker
from services.rerank.settings import RerankSettings


@dataclass(frozen=True, slots=True)
class RerankResources:
    """What the routes work with."""

    reranker: Reranker

    def problems(self) -> Sequence[str]:
        """Return why this process should be replaced."""
        return self.reranker.batcher.problems()


@asynccontextmanager
async def build(settings: RerankSettings, metrics: Metrics) -> AsyncIterator[RerankResources]:
    """Load the scorer, start the batcher and warm it up; stop it at the end."""
    with span("model.load") as loading:
        loading.set({"tercet.model": settings.model})
        backend = await asyncio.to_thread(load_backend, settings)
    reranker = Reranker(
        backend,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_items=settings.max_queue_items,
        tokenizer_threads=settings.tokenizer_threads,
        hang_s=settings.hang_s,
    )
    observe_batches(reranker.batcher, metrics, "rerank")
    await reranker.batcher.start()
    try:
        await reranker.score("warm up", ["a document"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        yield RerankResources(reranker)
    finally:
        await reranker.batcher.aclose()


def create_app(settings: RerankSettings) -> FastAPI:
    """Return the rerank service's app."""
    return create_service_app(
        "rerank",
        settings,
        build,
        [routes.router, compatible.router],
        description="Documents by relevance to a query: native, and Jina- and Cohere-compatible under /v1.",
    )
