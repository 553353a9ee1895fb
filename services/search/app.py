"""The composition root: settings to resources to the ASGI app."""

import asyncio
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
from services.search.changes import Changes
from services.search.clients import HttpEmbeddingClient, HttpRerankClient
from services.search.indexing import Indexing
from services.search.ingest import Ingest
from services.search.ledger.sqlite import SqliteLedger
from services.search.pipeline import PipelineOptions, SearchPipeline
from services.search.ports import Ledger, ResultCache, Retriever
from services.search.reindexing import Reindexing
from services.search.resources import SearchResources
from services.search.settings import SearchSettings
from services.search.shards.directory import ShardDirectory
from services.search.shards.endpoints import Nodes
from services.search.shards.host import HostOptions, LocalHost
from services.search.shards.host_metrics import HostMetrics
from services.search.shards.lexical import LANGUAGES, TantivyHighlighter, question_terms
from services.search.shards.remote import RemoteHost
from services.search.shards.replicas import OneHost, Placement, Replica
from services.search.shards.router import ShardRouter
from services.search.shards.serving import NodeResources, node_routes
from services.search.shards.trimming import Trimmer
from services.search.shards.vectors import VectorOptions


@asynccontextmanager
async def build(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[SearchResources]:
    """Open the ledger, let the shards follow it, and connect to the other services; close all in reverse."""
    async with AsyncExitStack() as stack:
        ledger = await _open_ledger(settings, stack)
        retriever = await _open_shards(settings, ledger, metrics, stack)
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
            languages=LANGUAGES,
            create_on_write=settings.create_on_write,
        )
        indexing = Indexing(catalog, ledger, retriever, embedder)
        reindexing = Reindexing(catalog, ledger, retriever, embedder)
        stack.push_async_callback(reindexing.aclose)
        stages = metrics.histogram("tercet_search_stage_seconds", "Time of each stage of a search.", ("stage",))
        options = PipelineOptions(
            candidates=settings.candidates,
            rerank_candidates=settings.rerank_candidates,
            dense_weight=settings.dense_weight,
            rerank_blend=settings.rerank_blend,
        )
        yield SearchResources(
            catalog=catalog,
            indexing=indexing,
            ingest=Ingest(indexing),
            changes=Changes(catalog, ledger, retriever),
            reindexing=reindexing,
            retriever=retriever,
            pipeline=SearchPipeline(
                catalog,
                ledger,
                retriever,
                embedder,
                HttpRerankClient(rerank),
                cache,
                options,
                highlighter=TantivyHighlighter(),
                observe=lambda stage, seconds: stages.labels(stage).observe(seconds),
            ),
            cache=cache,
            cache_kind="redis" if settings.redis_url else "memory",
            clients={"embedding": embedding, "rerank": rerank},
        )


async def _open_ledger(settings: SearchSettings, stack: AsyncExitStack) -> Ledger:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    ledger: Ledger
    if settings.ledger_url is None:
        ledger = await SqliteLedger.open(settings.data_dir / "ledger.db")
    else:
        # Its driver is not imported where there is no such ledger.
        from services.search.ledger.postgres import PostgresLedger

        ledger = await PostgresLedger.open(settings.ledger_url.get_secret_value())
    stack.push_async_callback(ledger.aclose)
    return ledger


async def _open_host(
    settings: SearchSettings, ledger: Ledger, watched: HostMetrics, stack: AsyncExitStack, *, fallback: bool = False
) -> LocalHost:
    """Return a host of shards in this process: this node's part of them, or all in compressed form for *fallback*."""
    name = "fallback" if fallback else "local"
    directory = await asyncio.to_thread(
        ShardDirectory,
        settings.data_dir / ("fallback" if fallback else "shards"),
        vector_options(settings, compact=fallback),
        readers=settings.search_threads,
        writers=settings.write_threads,
        maintenance_share=settings.maintenance_share,
    )
    stack.push_async_callback(asyncio.to_thread, directory.close)
    options = HostOptions(
        node=0 if fallback else settings.shard_node,
        nodes=1 if fallback else settings.shard_node_count,
        poll_s=settings.follow_interval_s,
        snapshot_interval_s=settings.snapshot_interval_s,
        snapshot_operations=settings.snapshot_operations,
        idle_close_s=settings.idle_close_s,
        max_open=settings.max_open_collections,
    )
    host = LocalHost(
        name,
        ledger,
        directory,
        options,
        note_maintenance_seconds=lambda seconds: watched.note_maintenance_seconds(name, seconds),
    )
    stack.push_async_callback(host.aclose)
    watched.add(host)
    await host.start()
    return host


async def _open_shards(settings: SearchSettings, ledger: Ledger, metrics: Metrics, stack: AsyncExitStack) -> Retriever:
    """Return the router over this process's shards, or over those of the nodes."""
    watched = HostMetrics(metrics)
    hosts: list[LocalHost] = []
    fallback: Replica | None = None
    if settings.fallback == "local":
        hosts.append(await _open_host(settings, ledger, watched, stack, fallback=True))
        fallback = Replica(hosts[0], local=True)
    elif settings.fallback != "off":
        node = RemoteHost(f"fallback {settings.fallback}", settings.fallback.rstrip("/"), api_key=_node_key(settings))
        stack.push_async_callback(node.aclose)
        fallback = Replica(node)
    placement: Placement
    if settings.role == "router":
        nodes = Nodes(settings.nodes(), api_key=_node_key(settings), fallback=fallback)
        stack.push_async_callback(nodes.aclose)
        await nodes.start()
        placement = nodes
    else:
        hosts.append(await _open_host(settings, ledger, watched, stack))
        placement = OneHost(Replica(hosts[-1], local=True), fallback)
    trimmer = Trimmer(ledger, hosts, interval_s=settings.snapshot_interval_s, after_s=settings.trim_after_s)
    stack.push_async_callback(trimmer.aclose)
    trimmer.start()
    router = ShardRouter(
        placement, question_terms, note_failure=watched.note_failure, note_fallback=watched.note_fallback
    )
    stack.push_async_callback(router.aclose)
    return router


def _node_key(settings: SearchSettings) -> str | None:
    key = settings.node_api_key or settings.peer_api_key
    return key.get_secret_value() if key else None


def vector_options(settings: SearchSettings, *, compact: bool) -> VectorOptions:
    """Return how shards keep their vectors."""
    return VectorOptions(
        tail_rows=settings.tail_rows,
        hnsw_rows=settings.hnsw_rows,
        ivf_rows=settings.ivf_rows,
        max_segment_rows=settings.max_segment_rows,
        ef_search=settings.ef_search,
        compact=compact,
    )


@asynccontextmanager
async def build_node(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[NodeResources]:
    """Open the ledger and a node's shards, which follow it; close all in reverse."""
    async with AsyncExitStack() as stack:
        ledger = await _open_ledger(settings, stack)
        fallback = settings.role == "fallback"
        yield NodeResources(await _open_host(settings, ledger, HostMetrics(metrics), stack, fallback=fallback))


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
    """Return the search service's app, or a shard node's, as the role says."""
    if settings.role in ("shard", "fallback"):
        return create_service_app(
            "search",
            settings,
            build_node,
            [node_routes()],
            description="A node that hosts shards for search services.",
            needs=lambda _method, _path: "search",
        )
    return create_service_app(
        "search",
        settings,
        build,
        [routes.router, web.router],
        description="Documents in, ranked answers out.",
        needs=routes.scope_needed,
        streams=routes.is_stream,
    )
