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
from services.embedding import routes
from services.embedding.dialects import openai
from services.embedding.embedder import Embedder
from services.embedding.models import load_backend
from services.embedding.settings import EmbeddingSettings


@dataclass(frozen=True, slots=True)
class EmbeddingResources:
    """What the routes work with."""

    embedder: Embedder

    def problems(self) -> Sequence[str]:
        """Return why this process should be replaced."""
        return self.embedder.batcher.problems()


@asynccontextmanager
async def build(settings: EmbeddingSettings, metrics: Metrics) -> AsyncIterator[EmbeddingResources]:
    """Load the model, start the batcher and warm it up; stop it at the end."""
    backend = await asyncio.to_thread(load_backend, settings)
    embedder = Embedder(
        backend,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_items=settings.max_queue_items,
        tokenizer_threads=settings.tokenizer_threads,
        hang_s=settings.hang_s,
    )
    observe_batches(embedder.batcher, metrics, "embedding")
    await embedder.batcher.start()
    try:
        await embedder.embed(["warm up"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        yield EmbeddingResources(embedder)
    finally:
        await embedder.batcher.aclose()


def create_app(settings: EmbeddingSettings) -> FastAPI:
    """Return the embedding service's app."""
    return create_service_app(
        "embedding",
        settings,
        build,
        [routes.router, openai.router],
        description="Text to vectors: native, and OpenAI-compatible under /v1.",
    )
