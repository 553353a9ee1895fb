"""The composition root: settings to resources to the ASGI app."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import astuple
from math import inf
from typing import Any, Final

from fastapi import FastAPI

from services.common.admission import Admission, open_admission
from services.common.app import create_service_app, make_breaker, make_retry_budget, make_store
from services.common.http_client import ServiceClient
from services.common.metrics import Metrics
from services.search import routes, web
from services.search.batches import Batches
from services.search.cache import MemoryResultCache, RedisResultCache
from services.search.cache_metrics import CacheMetrics
from services.search.catalog import Catalog
from services.search.changes import Changes
from services.search.clients import HttpEmbeddingClient, HttpRerankClient
from services.search.indexing import Indexing
from services.search.ingest import Ingest
from services.search.kept_answers import KeptAnswers
from services.search.ledger.sqlite import SqliteLedger
from services.search.metrics import SearchMetrics
from services.search.pipeline import SearchPipeline
from services.search.ports import Ledger, Retriever
from services.search.quality import ShadowSearch, Watched
from services.search.reindexing import Reindexing
from services.search.resources import SearchResources
from services.search.settings import SearchSettings
from services.search.shards.calling import AskingOptions
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
from services.search.slow_log import SlowLog
from services.search.stages import PipelineOptions
from services.search.watermarks import watermarks_of

BULK: Final = "embedding_bulk"


@asynccontextmanager
async def build(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[SearchResources]:
    """Open the ledger, let the shards follow it, and connect to the other services; close all in reverse."""
    async with AsyncExitStack() as stack:
        ledger = await _open_ledger(settings, metrics, stack)
        retriever = await _open_shards(settings, ledger, metrics, stack)
        peers = _clients(settings, metrics, stack)
        embedder = HttpEmbeddingClient(peers["embedding"], peers.get(BULK))
        catalog = Catalog(
            ledger,
            retriever,
            embedder,
            default_collection=settings.default_collection,
            default_shards=settings.shards_of_a_new_collection,
            languages=LANGUAGES,
            create_on_write=settings.create_on_write,
        )
        indexing = Indexing(catalog, ledger, retriever, embedder)
        reindexing = Reindexing(catalog, ledger, retriever, embedder)
        stack.push_async_callback(reindexing.aclose)
        options = PipelineOptions(
            candidates=settings.candidates,
            rerank_candidates=settings.rerank_candidates,
            dense_weight=settings.dense_weight,
            rerank_blend=settings.rerank_blend,
        )
        admission = open_admission(
            "searches", metrics, ceiling=settings.max_concurrent_searches, max_waiting=settings.max_waiting_searches
        )
        kept, layers = _open_kept(settings, metrics, ledger, options, stack)
        watch = _open_watch(settings, metrics, retriever, admission, stack)
        pipeline = SearchPipeline(
            catalog,
            ledger,
            retriever,
            embedder,
            HttpRerankClient(peers["rerank"]),
            kept,
            options,
            admission=admission,
            highlighter=TantivyHighlighter(),
            watch=watch,
            breakers=lambda: {name: breaker.state for name, breaker in sorted(metrics.breakers.items())},
            patience_s=settings.breaker_slow_call_s,
        )
        yield SearchResources(
            catalog=catalog,
            indexing=indexing,
            ingest=Ingest(indexing),
            changes=Changes(catalog, ledger, retriever),
            reindexing=reindexing,
            retriever=retriever,
            pipeline=pipeline,
            batches=Batches(catalog, embedder, pipeline),
            cache=kept,
            cache_kind="redis" if settings.redis_url else "memory",
            cache_layers=layers,
            admission=admission,
            clients=peers,
        )


def _open_watch(
    settings: SearchSettings, metrics: Metrics, retriever: Retriever, admission: Admission, stack: AsyncExitStack
) -> Watched:
    """Return what is told of every search: the metrics, the sample that measures recall, and the slow log."""
    series = SearchMetrics(metrics)
    shadow = ShadowSearch(
        retriever,
        ratio=settings.recall_sample_ratio,
        report=series.note_recall,
        note=series.note_sample,
        pressure=lambda: admission.pressure,
    )
    stack.push_async_callback(shadow.aclose)
    slow = SlowLog(slow_s=settings.slow_search_s, log_queries=settings.log_queries)
    return Watched(
        [series.finished, shadow.finished, slow.finished], note_stage=series.note_stage, note_failed=slow.failed
    )


async def _open_ledger(settings: SearchSettings, metrics: Metrics, stack: AsyncExitStack) -> Ledger:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    ledger: Ledger
    if settings.ledger_url is None:
        ledger = await SqliteLedger.open(settings.data_dir / "ledger.db")
    else:
        # Its driver is not imported where there is no such ledger.
        from services.search.ledger.postgres import PostgresLedger

        breaker = make_breaker("ledger", settings, metrics)
        ledger = await PostgresLedger.open(settings.ledger_url.get_secret_value(), breaker=breaker)
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
        idle_close_s=inf if fallback else settings.idle_close_s,
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
    options = AskingOptions(
        make_breaker=lambda name: make_breaker(name, settings, metrics),
        budget=make_retry_budget("shards", metrics) if settings.hedge_reads else None,
        slow_call_s=settings.breaker_slow_call_s,
        note_failure=watched.note_failure,
        note_fallback=watched.note_fallback,
        note_lexical_failure=watched.note_lexical_failure,
        note_hedge=watched.note_hedge,
    )
    router = ShardRouter(placement, question_terms, options)
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
        ledger = await _open_ledger(settings, metrics, stack)
        fallback = settings.role == "fallback"
        yield NodeResources(await _open_host(settings, ledger, HostMetrics(metrics), stack, fallback=fallback))


def _client(
    settings: SearchSettings, metrics: Metrics, name: str, url: str, max_calls: int, stack: AsyncExitStack
) -> ServiceClient:
    key = settings.peer_api_key.get_secret_value() if settings.peer_api_key else None
    client = ServiceClient(
        name,
        url,
        make_breaker(name, settings, metrics),
        api_key=key,
        max_calls=max_calls,
        slow_s=settings.breaker_slow_call_s,
        budget=make_retry_budget(name, metrics),
    )
    stack.push_async_callback(client.aclose)
    return client


def _clients(settings: SearchSettings, metrics: Metrics, stack: AsyncExitStack) -> dict[str, ServiceClient]:
    """Return the clients of the other services, by name; `BULK` is embedding's other address, where there is one."""
    embedding_calls = settings.embedding_max_calls
    asked = [
        ("embedding", settings.embedding_url, embedding_calls),
        ("rerank", settings.rerank_url, settings.rerank_max_calls),
    ]
    if settings.embedding_bulk_url is not None:
        asked.append((BULK, settings.embedding_bulk_url, embedding_calls))
    return {name: _client(settings, metrics, name, url, most, stack) for name, url, most in asked}


def _open_kept(
    settings: SearchSettings, metrics: Metrics, ledger: Ledger, options: PipelineOptions, stack: AsyncExitStack
) -> tuple[KeptAnswers, Callable[[], Mapping[str, Any]]]:
    """Return the result cache, in this process and before a shared one where there is a Redis, and how its layers stand."""
    notes = CacheMetrics(metrics)
    lives_s = max(settings.cache_ttl_s, settings.stale_if_error_s)
    near = MemoryResultCache(
        max_bytes=settings.cache_bytes,
        max_entry_bytes=settings.cache_entry_bytes,
        ttl_s=lives_s,
        evicted=notes.evicted,
    )
    notes.show(lambda: near.used_bytes, lambda: near.entries)
    shared: RedisResultCache | None = None
    if settings.redis_url is not None:
        store = make_store("redis", settings.redis_url, settings, metrics)
        shared = RedisResultCache(store, ttl_s=lives_s, max_entry_bytes=settings.cache_entry_bytes)
        stack.push_async_callback(shared.aclose)
    watermarks = watermarks_of(ledger)
    stack.push_async_callback(watermarks.aclose)
    kept = KeptAnswers(
        near,
        watermarks,
        ledger,
        astuple(options),
        ttl_s=settings.cache_ttl_s,
        stale_if_error_s=settings.stale_if_error_s,
        shared=shared,
        notes=notes,
    )
    stack.push_async_callback(kept.aclose)

    def layers() -> Mapping[str, Any]:
        memory = {"entries": near.entries, "bytes": near.used_bytes, "max_bytes": settings.cache_bytes}
        return {"memory": memory} if shared is None else {"memory": memory, "redis": {"available": shared.available}}

    return kept, layers


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
        [*routes.routers, web.router],
        description="Documents in, ranked answers out.",
        needs=routes.scope_needed,
        streams=routes.is_stream,
        door=routes.door,
    )
