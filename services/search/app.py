"""The composition root: settings to resources to the ASGI app."""

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from services.common.app import create_service_app, make_breaker
from services.common.http_client import ServiceClient
from services.common.key_value import KeyValueStore
from services.common.metrics import Metrics
from services.search import routes, web
from services.search.cache import MemoryResultCache, RedisResultCache
from services.search.catalog import Catalog
from services.search.clients import HttpEmbeddingClient, HttpRerankClient
from services.search.indexing import Indexing
from services.search.ledger.sqlite import SqliteLedger
from services.search.pipeline import PipelineOptions, SearchPipeline
from services.search.ports import Collection, Ledger, ResultCache, Retriever
from services.search.resources import SearchResources
from services.search.settings import SearchSettings
from services.search.shards.lexical import analyze
from services.search.shards.local import LocalShard, search_threads
from services.search.shards.router import LocalRetriever


@asynccontextmanager
async def build(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[SearchResources]:
    """Open the ledger, let the shards follow it, and connect to the other services; close all in reverse."""
    async with AsyncExitStack() as stack:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        ledger = await SqliteLedger.open(settings.data_dir / "ledger.db")
        stack.push_async_callback(ledger.aclose)
        retriever = await _open_shards(settings, ledger, stack)
        embedding = _client(settings, metrics, "embedding", settings.embedding_url, stack)
        rerank = _client(settings, metrics, "rerank", settings.rerank_url, stack)
        cache = _open_cache(settings, metrics)
        stack.push_async_callback(cache.aclose)
        embedder = HttpEmbeddingClient(embedding)
        catalog = Catalog(
            ledger,
            retriever,
            embedder,
            default_collection=settings.default_collection,
            default_shards=settings.default_shards,
        )
        stages = metrics.histogram("tercet_search_stage_seconds", "Time of each stage of a search.", ("stage",))
        options = PipelineOptions(
            candidates=settings.candidates,
            rerank_candidates=settings.rerank_candidates,
            dense_weight=settings.dense_weight,
            rerank_blend=settings.rerank_blend,
        )
        yield SearchResources(
            catalog=catalog,
            indexing=Indexing(catalog, ledger, retriever, embedder),
            pipeline=SearchPipeline(
                catalog,
                ledger,
                retriever,
                embedder,
                HttpRerankClient(rerank),
                cache,
                options,
                observe=lambda stage, seconds: stages.labels(stage).observe(seconds),
            ),
            cache=cache,
            cache_kind="redis" if settings.redis_url else "memory",
            clients={"embedding": embedding, "rerank": rerank},
        )


async def _open_shards(settings: SearchSettings, ledger: Ledger, stack: AsyncExitStack) -> Retriever:
    directory = settings.data_dir / "shards"
    # Shards are derived from the ledger and followed from its beginning: what an earlier process left is of no use.
    shutil.rmtree(directory, ignore_errors=True)
    readers = search_threads(settings.search_threads)
    stack.callback(readers.shutdown, wait=True, cancel_futures=True)

    def make_shard(collection: Collection, number: int) -> LocalShard:
        return LocalShard(number, directory / collection.uuid / str(number), collection.dim, readers=readers)

    def discard(collection: Collection) -> None:
        shutil.rmtree(directory / collection.uuid, ignore_errors=True)

    retriever = LocalRetriever(ledger, make_shard, analyze, discard=discard, poll_s=settings.follow_interval_s)
    stack.push_async_callback(retriever.aclose)
    await retriever.open_collections()
    return retriever


def _client(settings: SearchSettings, metrics: Metrics, name: str, url: str, stack: AsyncExitStack) -> ServiceClient:
    key = settings.peer_api_key.get_secret_value() if settings.peer_api_key else None
    client = ServiceClient(name, url, make_breaker(name, settings, metrics), api_key=key)
    stack.push_async_callback(client.aclose)
    return client


def _open_cache(settings: SearchSettings, metrics: Metrics) -> ResultCache:
    if settings.redis_url is None:
        return MemoryResultCache(max_bytes=settings.cache_bytes, ttl_s=settings.cache_ttl_s)
    store = KeyValueStore(settings.redis_url, make_breaker("redis", settings, metrics))
    return RedisResultCache(store, ttl_s=settings.cache_ttl_s)


def create_app(settings: SearchSettings) -> FastAPI:
    """Return the search service's app."""
    return create_service_app(
        "search",
        settings,
        build,
        [routes.router, web.router],
        description="Documents in, ranked answers out.",
        needs=routes.scope_needed,
    )
