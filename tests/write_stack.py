"""The search service's write side over a real SQLite ledger, with an embedding service and shards that are dictionaries."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi import FastAPI

from services.common.admission import Admission
from services.common.app import create_service_app
from services.common.deadline import Deadline
from services.common.errors import NotFound
from services.common.metrics import Metrics
from services.search import routes
from services.search.catalog import Catalog
from services.search.changes import Changes
from services.search.filters import matches
from services.search.indexing import Indexing
from services.search.ingest import Ingest
from services.search.ledger.sqlite import SqliteLedger
from services.search.ports import (
    AuditReport,
    Collection,
    Embedded,
    EmbeddingModel,
    Ledger,
    Match,
    ShardStanding,
)
from services.search.reindexing import Reindexing
from services.search.resources import SearchResources
from services.search.settings import SearchSettings

MODELS = {"m": EmbeddingModel("m", "m@1", 2), "wide": EmbeddingModel("wide", "wide@1", 3)}


class Embedding:
    """The vector of a text says how long it is; *errors* are raised by the next calls; *gate* holds calls up."""

    def __init__(self) -> None:
        self.models = dict(MODELS)
        self.default = "m"
        self.errors: list[Exception] = []
        self.seen: list[str] = []
        self.under_way = 0
        self.most_under_way = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def embed_documents(self, texts: Sequence[str], deadline: Deadline, *, model: str | None = None) -> Embedded:
        """Embed *texts*."""
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            found = await self.model(deadline, model=model)
            await self.gate.wait()
        finally:
            self.under_way -= 1
        self.seen += texts
        vectors = np.array([[1.0, len(text), 0.0][: found.dim] for text in texts], dtype=np.float32)
        return Embedded(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), found)

    async def model(self, deadline: Deadline, *, model: str | None = None) -> EmbeddingModel:
        """Describe a model."""
        if self.errors:
            raise self.errors.pop(0)
        name = model or self.default
        if name not in self.models:
            raise NotFound(f"there is no model {name!r}", param="model")
        return self.models[name]


class Shards:
    """Shards that are always up to date, as they read the ledger itself."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.notified: list[int] = []
        self.waited: list[int] = []
        self.forgotten: list[str] = []
        self.behind = False
        self.error: Exception | None = None

    def notify(self, collection: Collection, seq: int) -> None:
        """Note it."""
        self.notified.append(seq)

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        """Say yes, unless *behind*."""
        self.waited.append(seq)
        return not self.behind

    async def applied_seq(self, collection: Collection) -> int:
        """Return the ledger's."""
        return (await self.ledger.state(collection.uuid)).seq

    async def matching(self, collection: Collection, filter: Any, deadline: Deadline, *, limit: int) -> list[Match]:
        """Read the whole ledger."""
        if self.error is not None:
            raise self.error
        found = await self.ledger.operations_after(collection.uuid, 0, limit=100_000)
        live = [each for each in found if each.document is not None]
        hits = [each for each in live if matches(filter, each.document.metadata, collection.attributes)]
        return [Match(each.id, each.seq) for each in hits[:limit]]

    async def standings(self, collection: Collection, deadline: Deadline) -> Mapping[str, Sequence[ShardStanding]]:
        """Return one host with all of it in shard 0."""
        state = await self.ledger.state(collection.uuid)
        return {"here": [ShardStanding(0, state.seq, state.documents, segments={"tail": state.documents})]}

    async def audit(
        self, collection: Collection, deadline: Deadline, *, repair: bool
    ) -> Mapping[str, Sequence[AuditReport]]:
        """Find one document missing until it is repaired."""
        return {"here": [AuditReport(0, 1, 1, {} if repair else {"missing": ["a"]}, repaired=int(repair))]}

    async def snapshot(self, collection: Collection, deadline: Deadline) -> Mapping[str, Mapping[int, int]]:
        """Return the ledger's operation number."""
        return {"here": {0: (await self.ledger.state(collection.uuid)).seq}}

    async def forget(self, collection: Collection) -> None:
        """Note it."""
        self.forgotten.append(collection.name)


class WriteStack(SimpleNamespace):
    """The write side and what it stands on: ledger, shards, embedding, catalog, indexing, ingest, changes, reindexing."""


@asynccontextmanager
async def write_stack(directory: Path, **options: Any) -> AsyncIterator[WriteStack]:
    """Yield a write side without collections; *options* are the catalog's."""
    ledger = await SqliteLedger.open(directory / "ledger.db")
    try:
        shards, embedding = Shards(ledger), Embedding()
        settings = {"default_collection": "books", "default_shards": 2, "languages": ("english", "german"), **options}
        catalog = Catalog(ledger, shards, embedding, **settings)
        indexing = Indexing(catalog, ledger, shards, embedding)
        reindexing = Reindexing(catalog, ledger, shards, embedding, settle_s=0.0)
        yield WriteStack(
            ledger=ledger,
            shards=shards,
            embedding=embedding,
            catalog=catalog,
            indexing=indexing,
            ingest=Ingest(indexing),
            changes=Changes(catalog, ledger, shards),
            reindexing=reindexing,
        )
        await reindexing.aclose()
    finally:
        await ledger.aclose()


def write_app(stack: WriteStack, **settings: Any) -> FastAPI:
    """Return the service's app with the routes of the write side over *stack*."""

    @asynccontextmanager
    async def build(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[SearchResources]:
        yield SearchResources(
            catalog=stack.catalog,
            indexing=stack.indexing,
            ingest=stack.ingest,
            changes=stack.changes,
            reindexing=stack.reindexing,
            retriever=stack.shards,
            pipeline=None,
            batches=None,
            cache=None,
            cache_kind="memory",
            cache_layers=dict,
            admission=Admission("searches"),
            clients={},
        )

    return create_service_app(
        "search",
        SearchSettings(**settings),
        build,
        routes.routers,
        description="",
        needs=routes.scope_needed,
        streams=routes.is_stream,
    )
