"""
The store and the indexes of one shard as its writer sees them, and the one view that searches see.

All only gain rows while searches run. An apply becomes visible by one assignment of a new view: a search sees all of
it or none, and takes no lock. Methods that write are called by one thread at a time.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pyroaring import BitMap

from services.search.filters import Expression
from services.search.ports import Collection, Match, Operation, ShardDocument
from services.search.shards import lexical as words
from services.search.shards import vectors as dense
from services.search.shards.attributes import AttributeIndex
from services.search.shards.ids import IdArena
from services.search.shards.lexical import LexicalIndex
from services.search.shards.store import ShardStore, StoreMark
from services.search.shards.vectors import VectorIndex
from services.search.shards.view import ShardView

_ATTEMPTS_TO_MATCH = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """What a shard is made of."""

    store: ShardStore
    ids: IdArena
    attributes: AttributeIndex
    vectors: VectorIndex
    lexical: LexicalIndex


@dataclass(frozen=True, slots=True)
class Frozen:
    """A shard as of one moment, as far as it is not in files that nobody changes."""

    view: ShardView
    generation: int
    next_row: int
    mark: StoreMark
    ids: bytes
    attributes: bytes
    vectors: dict[str, Any]
    vector_files: list[str]
    lexical: dict[str, Any]


class ShardContents:
    """The parts of one shard and the view of them."""

    def __init__(self, collection: Collection, number: int, parts: Parts, view: ShardView) -> None:
        self.collection = collection
        self.number = number
        self.parts = parts
        self.view = view
        self.generation = 0  # how often anything but `applied_seq` has changed
        self._publishing = threading.Lock()
        self._watched: tuple[set[str], ...] = ()

    # --- writing: one thread at a time

    def apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        """
        Take those of *operations* that are newer than the view, and become true up to *applied_seq*.

        Whatever it raises, nothing of the call is visible then, and it may be repeated.
        """
        newest = {
            operation.id: operation
            for operation in sorted(operations, key=lambda operation: operation.seq)
            if operation.seq > self.view.applied_seq
        }
        for watched in self._watched:
            watched.update(newest)
        self._replace(list(newest.values()), max(applied_seq, self.view.applied_seq))

    def mend(self, operations: Sequence[Operation], surplus: BitMap) -> None:
        """Do again what these operations, which were applied before, should have left here, and bury *surplus* rows."""
        self._replace(operations, self.view.applied_seq, surplus)

    def swap_vectors(self, job: dense.Job, built: dense.Built) -> None:
        """Let searches use what was built for the vectors."""
        self.parts.vectors.swap(job, built)
        self.generation += 1
        self.view = replace(self.view, vectors=self.parts.vectors.view())

    def swap_lexical(self, job: words.Job, built: words.Built) -> None:
        """Let searches use what was built for the words."""
        view = self.parts.lexical.swap(job, built)
        self.generation += 1
        self.view = replace(self.view, lexical=view)

    def freeze(self, lexical_directory: Path) -> Frozen:
        """Return all of it as of now; the files of the words get second names in *lexical_directory*."""
        parts = self.parts
        vectors, vector_files = parts.vectors.freeze()
        # What was in memory may be in files now, and is freed when no view has it any more.
        self.view = replace(self.view, vectors=parts.vectors.view())
        return Frozen(
            self.view,
            self.generation,
            len(parts.vectors),
            parts.store.mark,
            parts.ids.freeze(),
            parts.attributes.freeze(),
            vectors,
            vector_files,
            parts.lexical.freeze(lexical_directory),
        )

    def _replace(self, changes: Sequence[Operation], applied_seq: int, surplus: BitMap | None = None) -> None:
        parts, view = self.parts, self.view
        replaced = BitMap() if surplus is None else surplus
        if changes:
            replaced = replaced | BitMap(parts.store.rows_of([change.id for change in changes]).values())
        added = [(change.seq, change.document) for change in changes if change.document is not None]
        if not replaced and not added:
            self.view = replace(view, applied_seq=applied_seq)
            return
        first_row = len(parts.vectors)
        lexical = view.lexical
        try:
            parts.store.replace(replaced, first_row, added)
            if added:
                parts.vectors.add(first_row, np.stack([document.vector for _, document in added]))
                parts.ids.extend(first_row, [document.id for _, document in added])
                for row, (_, document) in enumerate(added, first_row):
                    parts.attributes.add(row, document.metadata)
                    parts.lexical.add(row, document.title, document.text)
                lexical = parts.lexical.commit()
        except Exception:
            parts.store.rollback()
            parts.lexical.rollback()
            raise
        live = view.live - replaced
        live.add_range(first_row, first_row + len(added))
        with self._publishing:  # Neither a search nor a fetch sees the one without the other.
            parts.store.commit(max([parts.store.mark.seq, *(change.seq for change in changes)]))
            self.generation += 1
            self.view = replace(view, applied_seq=applied_seq, live=live, vectors=parts.vectors.view(), lexical=lexical)

    # --- reading: any thread

    def fetch(self, ids: Sequence[str], *, vectors: bool) -> dict[str, ShardDocument]:
        """Return the live documents among *ids*, as of one moment."""
        found, view = self.stored(ids)
        rows = [row for row in found if row in view.live]
        if not vectors or not rows:
            return {found[row].id: found[row] for row in rows}
        values = view.vectors.get(np.array(rows, np.int64))
        return {found[row].id: replace(found[row], vector=value) for row, value in zip(rows, values, strict=True)}

    def stored(self, ids: Sequence[str]) -> tuple[dict[int, ShardDocument], ShardView]:
        """Return what the store has of *ids*, by row, and the view that goes with it."""
        with self._publishing:
            return self.parts.store.fetch(ids), self.view

    def matching(self, expression: Expression | None, limit: int) -> list[Match]:
        """Return up to *limit* live documents that match, by row."""
        matches: list[Match] = []
        for _ in range(_ATTEMPTS_TO_MATCH):
            view = self.view
            rows = list(view.allowed(expression)[:limit])
            matches = self.parts.store.matches(rows)
            if len(matches) == len(rows) or view is self.view:
                break  # Otherwise documents were replaced meanwhile, which may match still.
        return matches

    @contextmanager
    def watching(self) -> Iterator[Callable[[], frozenset[str]]]:
        """Note, from now until the block ends, which ids are applied; what is yielded returns those up to now."""
        noted: set[str] = set()
        self._watched = (*self._watched, noted)
        try:
            yield lambda: frozenset(noted.copy())
        finally:
            self._watched = tuple(other for other in self._watched if other is not noted)
