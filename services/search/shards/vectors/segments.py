"""
A segment: rows that do not change any more, and how they are searched.

Vectors, row numbers and codes of a segment that has files are memory-mapped: they take page cache, not memory of the
process, and a mapped file that is deleted stays readable until the last view lets go of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from services.search.ports import Metric, Vector
from services.search.shards.vectors.metrics import GATHERED_ROWS, Rows, Scores, Vectors, best, faiss, score_all
from services.search.shards.vectors.planning import Kind, Plan, VectorOptions, plan_segment


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """
    Live rows, as of when it was made, of the range *start* to *stop* (exclusive).

    *numbers* are the global row numbers in increasing order; None: all of the range. Position *i* in *vectors* and in
    *index* is *numbers[i]*. A flat segment has no *index*, a compact one no *vectors*. *files* is the size and SHA-256
    of each file by name, *parts* their names by role; both are empty while it is only in memory.
    """

    kind: Kind
    metric: Metric
    start: int
    stop: int
    numbers: NDArray[np.uint32] | None
    vectors: Vectors | None
    index: Any = None
    parts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return how many rows it has."""
        return self.stop - self.start if self.numbers is None else len(self.numbers)

    @property
    def memory_bytes(self) -> int:
        """How much of the process's own memory it takes; mapped files are not in it."""
        return 0 if self.files or self.vectors is None else self.vectors.nbytes

    def allowed(self, rows: BitMap) -> int:
        """Return how many of *rows* it may have (those that it dropped as dead are never in *rows*)."""
        return int(rows.range_cardinality(self.start, self.stop))

    def positions(self, rows: NDArray[Any]) -> Rows:
        """Return where *rows* are. Raises IndexError for a row that it has not."""
        if self.numbers is None:
            return rows.astype(np.int64) - self.start
        found = np.searchsorted(self.numbers, rows.astype(np.uint32))
        if not np.array_equal(self.numbers[np.minimum(found, len(self.numbers) - 1)], rows):
            raise IndexError("there is no such row")
        return found.astype(np.int64)

    def rows(self, positions: Rows) -> Rows:
        """Return the global row numbers at *positions*."""
        return positions + self.start if self.numbers is None else self.numbers[positions].astype(np.int64)

    def at(self, positions: Rows) -> Vectors:
        """Return copies of the vectors at *positions*, decoded from codes where it has only those."""
        if self.vectors is not None:
            return self.vectors[positions]
        decoded: Vectors = self.index.reconstruct_batch(positions)
        return decoded

    def live(self, rows: BitMap) -> Rows:
        """Return the positions of those of *rows* that are its own, in increasing order."""
        within = rows if rows and rows.min() >= self.start and rows.max() < self.stop else None
        if within is None:
            within = rows & BitMap(range(self.start, self.stop))
        return self.positions(np.frombuffer(within.to_array(), np.uint32))

    def search(
        self, vector: Vector, limit: int, allowed: BitMap, options: VectorOptions, *, exact: bool
    ) -> tuple[Rows, Scores, Plan]:
        """Return up to *limit* best of *allowed* (it has some of them) with their scores, and how they were found."""
        count = self.allowed(allowed)
        plan = plan_segment(
            self.kind, len(self), count, limit, options, dot=self.metric == "dot", exact=exact and self.kind != "codes"
        )
        if plan.way in ("gather", "flat"):
            positions = None if count == len(self) else self.live(allowed)
            return *self._exact(vector, limit, positions, in_place=plan.way == "flat"), plan
        found, scores = self._ask(vector, plan, allowed)
        rows = self.rows(found)
        if not plan.selected and count < len(self):
            kept = np.fromiter((int(row) in allowed for row in rows), np.bool_, len(rows))
            rows, found, scores = rows[kept], found[kept], scores[kept]
            if len(rows) < min(limit, count):
                # The dead ones lie together just here: now they are kept out.
                plan = Plan(plan.way, plan.fetch, plan.beam * 2, True, True)
                found, scores = self._ask(vector, plan, allowed)
                rows = self.rows(found)
        if self.vectors is not None:
            scores = score_all(self.metric, self.at(found), vector)
        return *best(rows, scores, limit), plan

    def _exact(self, vector: Vector, limit: int, positions: Rows | None, *, in_place: bool) -> tuple[Rows, Scores]:
        """Score *positions* (None: all): in place by scoring everything, else by gathering a bounded number at a time."""
        assert self.vectors is not None
        if in_place:
            scores = score_all(self.metric, self.vectors, vector)
            positions = np.arange(len(self)) if positions is None else positions
            return best(self.rows(positions), scores[positions], limit)
        assert positions is not None
        parts = [
            score_all(self.metric, self.vectors[positions[at : at + GATHERED_ROWS]], vector)
            for at in range(0, len(positions), GATHERED_ROWS)
        ]
        return best(self.rows(positions), np.concatenate(parts), limit)

    def _ask(self, vector: Vector, plan: Plan, allowed: BitMap) -> tuple[Rows, Scores]:
        """Return FAISS's positions and scores, which are those of the codes."""
        index, selector = self.index, None
        if plan.selected:
            mask = np.zeros(len(self), np.bool_)
            mask[self.live(allowed)] = True
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
        if self.kind == "ivf":
            lists = index.nlist if plan.way == "scan" else min(index.nlist, max(8, plan.beam // 4))
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=lists)
        elif plan.way == "scan":
            index = index.storage if self.kind == "hnsw" else index
            parameters = faiss.SearchParameters(sel=selector)
        else:
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=plan.beam)
        scores, found = index.search(vector[np.newaxis], plan.fetch, params=parameters)
        there = found[0] >= 0
        values = scores[0][there]
        return found[0][there], -values if self.metric == "l2" else values


def slices(segment: Segment, positions: Rows, rows: int) -> Iterator[Vectors]:
    """Yield the vectors at *positions*, up to *rows* at a time."""
    for at in range(0, len(positions), rows):
        yield np.ascontiguousarray(segment.at(positions[at : at + rows]))


def gather(segments: tuple[Segment, ...], rows: Rows, dim: int) -> Vectors:
    """Return the vectors of *rows*, in their order, from whichever segments have them. Raises IndexError."""
    if len(rows) and not (segments and segments[0].start <= rows.min() <= rows.max() < segments[-1].stop):
        raise IndexError("there is no such row")
    vectors = np.empty((len(rows), dim), np.float32)
    owner = np.searchsorted([segment.start for segment in segments], rows, side="right") - 1
    for number in np.unique(owner):
        mine, segment = owner == number, segments[number]
        if rows[mine].max() >= segment.stop:
            raise IndexError("there is no such row")
        vectors[mine] = segment.at(segment.positions(rows[mine]))
    return vectors
