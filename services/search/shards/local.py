"""
A shard in this process: a vector index, a lexical index, an attribute index and a store, behind the Shard port.

All four only ever gain rows while searches run. What searches may see is one immutable `_State`, and an apply becomes
visible by one assignment of a new one: a search sees all of an apply or none of it, and takes no lock.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from pyroaring import BitMap

from services.common.errors import BackendFailed, NotReady, TercetError
from services.search.filters import Expression
from services.search.ports import (
    Candidate,
    LedgerDocument,
    LexicalStatistics,
    Operation,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
)
from services.search.shards.attributes import AttributeIndex
from services.search.shards.lexical import LexicalIndex, LexicalView
from services.search.shards.store import ShardStore
from services.search.shards.vectors import VectorIndex, use_one_thread

_MAX_CACHED_FILTERS = 64

T = TypeVar("T")


def search_threads(count: int) -> ThreadPoolExecutor:
    """Return the pool that the searches of all of a process's shards run in: one query, one thread."""
    return ThreadPoolExecutor(count, thread_name_prefix="search", initializer=use_one_thread)


@dataclass(frozen=True, slots=True)
class _State:
    """What searches see. *filters* caches the rows of *live* that a filter selects, by the filter's key."""

    applied_seq: int
    live: BitMap
    lexical: LexicalView
    filters: dict[str, BitMap] = field(default_factory=dict)


class LocalShard:
    """
    A slice of a collection, in memory but for its texts, which are in a database in *directory*.

    It starts empty, whatever *directory* holds: its owner applies the ledger's operations to it. Searches run in
    *readers* (see `search_threads`), which may be shared with other shards and is not closed by this one.
    """

    def __init__(self, number: int, directory: Path, dim: int, *, readers: ThreadPoolExecutor) -> None:
        self._number = number
        self._vectors = VectorIndex(dim)
        self._lexical = LexicalIndex()
        self._attributes = AttributeIndex()
        self._store = ShardStore(directory)
        self._readers = readers
        self._reading: set[Future[Any]] = set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"shard-{number}")
        self._closed = False
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        # The last operation on every id, deleted ones too: an old write that is repeated must not bring one back.
        self._seqs: dict[str, int] = {}
        self._state = _State(0, BitMap(), self._lexical.commit())

    @property
    def number(self) -> int:
        """Which slice this is."""
        return self._number

    @property
    def applied_seq(self) -> int:
        """The last operation of the collection that this shard has seen."""
        return self._state.applied_seq

    @property
    def documents(self) -> int:
        """How many live documents it holds."""
        return len(self._state.live)

    async def apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        """
        Take *operations* and become true up to *applied_seq*; all become visible together, before this returns.

        Calls take effect one after the other. An operation that is older than what its document already has is passed
        over. Cancelling does not undo a call that has begun.

        Raises:
            BackendFailed: An index failed; searches see none of the call, and it may be repeated.
            NotReady: The shard is closed.
        """
        self._check_open()
        await asyncio.wrap_future(self._writer.submit(self._apply, operations, applied_seq))

    async def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        """Return document count and frequencies as BM25 counts them: documents deleted lately may be among them."""
        self._check_open()
        # Microseconds for each term: quicker here than by way of another thread.
        lexical = self._state.lexical
        return LexicalStatistics(lexical.num_docs, lexical.doc_freq(terms))

    async def search(self, query: ShardQuery) -> ShardAnswer:
        """Return the best candidates of each retriever, as of one moment. Raises BackendFailed, NotReady."""
        return await self._read(lambda: self._search(query))

    async def fetch(self, rows: Sequence[int], *, vectors: bool = False) -> dict[int, ShardDocument]:
        """Return the stored fields of those of *rows* that are still live. Raises BackendFailed, NotReady."""
        return await self._read(lambda: self._fetch(rows, vectors))

    async def aclose(self) -> None:
        """Free what it holds; searches and writes under way finish first."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*map(asyncio.wrap_future, tuple(self._reading)), return_exceptions=True)
        await asyncio.wrap_future(self._writer.submit(self._store.close))
        self._writer.shutdown(wait=False)

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady(f"Shard {self._number} is closed.")

    async def _read(self, work: Callable[[], T]) -> T:
        """Run *work* in the readers' pool; a caller that gives up leaves it to finish, and aclose waits for it."""
        self._check_open()
        future = self._readers.submit(work)
        self._reading.add(future)
        future.add_done_callback(self._reading.discard)
        try:
            return await asyncio.wrap_future(future)
        except TercetError:
            raise
        except Exception as error:
            raise BackendFailed(f"Shard {self._number} could not be read: {error}") from error

    # --- reading: in a thread of the pool

    def _search(self, query: ShardQuery) -> ShardAnswer:
        state = self._state
        start = perf_counter()
        allowed = self._allowed(state, query.filter)
        filtered = perf_counter()
        rows: list[int] = []
        if query.vector is not None:
            rows = self._vectors.search(query.vector, query.limit, allowed)[0].tolist()
        dense = perf_counter()
        bm25: dict[int, float] = {}
        if query.terms:
            found = state.lexical.search(query.terms, query.limit, statistics=query.statistics, allowed=allowed)
            bm25 = dict(found)
        lexical = perf_counter()
        candidates = self._candidates(query, list(dict.fromkeys([*rows, *bm25])), bm25)
        timings_ms = {
            "filter": (filtered - start) * 1e3,
            "dense": (dense - filtered) * 1e3,
            "lexical": (lexical - dense) * 1e3,
        }
        return ShardAnswer(self._number, state.applied_seq, candidates, timings_ms)

    def _candidates(self, query: ShardQuery, rows: list[int], bm25: dict[int, float]) -> list[Candidate]:
        """Return *rows* as candidates, each with its exact cosine whenever the query has a vector."""
        scores: list[float | None] = [None] * len(rows)
        if query.vector is not None:
            scores = self._vectors.score(query.vector, np.array(rows, np.int64)).tolist()
        return [
            Candidate(self._ids[row], self._number, row, score, bm25.get(row))
            for row, score in zip(rows, scores, strict=True)
        ]

    def _allowed(self, state: _State, expression: Expression | None) -> BitMap:
        if expression is None:
            return state.live
        key = expression.key()
        allowed = state.filters.get(key)
        if allowed is None:
            allowed = self._attributes.resolve(expression, state.live)
            if len(state.filters) < _MAX_CACHED_FILTERS:
                state.filters[key] = allowed
        return allowed

    def _fetch(self, rows: Sequence[int], vectors: bool) -> dict[int, ShardDocument]:
        live = self._state.live
        documents = self._store.fetch(row for row in rows if row in live)
        if not vectors:
            return documents
        found = self._vectors.get(np.array(list(documents), np.int64))
        return {row: replace(documents[row], vector=vector) for row, vector in zip(documents, found, strict=True)}

    # --- writing: in the writer's thread

    def _apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        applied_seq = max(applied_seq, self._state.applied_seq)
        newest = {operation.id: operation for operation in sorted(operations, key=lambda operation: operation.seq)}
        changes = [change for change in newest.values() if change.seq > self._seqs.get(change.id, 0)]
        if not changes:
            self._state = replace(self._state, applied_seq=applied_seq)
            return
        documents = [change.document for change in changes if change.document is not None]
        replaced = [self._rows[change.id] for change in changes if change.id in self._rows]
        first_row = len(self._vectors)
        try:
            lexical = self._write(first_row, documents, replaced)
        except Exception as error:
            raise BackendFailed(f"Shard {self._number} could not apply operations: {error}") from error

        live = self._state.live - BitMap(replaced)
        live.add_range(first_row, first_row + len(documents))
        self._state = _State(applied_seq, live, lexical)

        for change in changes:
            self._seqs[change.id] = change.seq
            self._rows.pop(change.id, None)
        self._rows.update((document.id, row) for row, document in enumerate(documents, first_row))
        self._store.remove(replaced)

    def _write(self, first_row: int, documents: Sequence[LedgerDocument], replaced: Sequence[int]) -> LexicalView:
        """Give all indexes the new rows, which no search can see yet; rows of a failed call are never used again."""
        if documents:
            self._vectors.add(first_row, np.stack([document.vector for document in documents]))
            self._ids.extend(document.id for document in documents)
        try:
            for row, document in enumerate(documents, first_row):
                self._attributes.add(row, document.metadata)
                self._lexical.add(row, document.title, document.text)
            for row in replaced:
                self._lexical.remove(row)
            self._store.add(first_row, documents)
            return self._lexical.commit()
        except Exception:
            self._lexical.rollback()
            self._store.remove(range(first_row, first_row + len(documents)))
            raise
