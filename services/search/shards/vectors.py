"""
Dense retrieval over one shard: vectors by row number.

Rows only grow. The newest are in a tail: a preallocated chunk whose filled part is published after each copy. A full
tail becomes a sealed FAISS segment. Readers take the tuple of segments as it is when they begin; nothing they can
see is moved or changed afterwards. Which rows are live is the caller's knowledge and comes with each question.

FAISS takes its number of threads per calling thread: those that search call `use_one_thread` once, when they start.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from services.search.ports import Vector

# Its stubs know neither the Python layer's keyword arguments nor the functions on raw arrays.
faiss: Any = _faiss

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
Vectors = NDArray[np.float32]

# Up to this many allowed rows, scoring just them beats visiting every segment.
_FEW_ROWS = 1024


def use_one_thread() -> None:
    """Make FAISS search in the calling thread alone: one query is one thread, and queries run side by side."""
    faiss.omp_set_num_threads(1)


class Segment(Protocol):
    """Rows *start* to *stop* (exclusive). Numbers that go in or come out are the index's, not the segment's own."""

    @property
    def start(self) -> int:
        """The first row."""
        ...

    @property
    def stop(self) -> int:
        """The row after the last."""
        ...

    def search(self, vector: Vector, limit: int, allowed: Rows | None) -> tuple[Rows, Scores]:
        """Return up to *limit* best rows and their inner products, best first; *allowed* None is all rows."""
        ...

    def get(self, rows: Rows) -> Vectors:
        """Return copies of the vectors of *rows*."""
        ...


class VectorIndex:
    """Unit vectors by row number; inner products are cosines. One writer and many readers may use it at once."""

    def __init__(self, dim: int, *, seal_rows: int = 8192) -> None:
        self._dim = dim
        self._seal_rows = seal_rows
        self._sealed: tuple[Segment, ...] = ()
        self._chunk: Vectors = np.empty((seal_rows, dim), np.float32)
        self._filled = 0
        self._segments: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        """Return how many rows there are, live or not: the number that the next row gets."""
        segments = self._segments
        return segments[-1].stop if segments else 0

    def add(self, first_row: int, vectors: Vectors) -> None:
        """
        Append *vectors* (shape [n, dim]) as rows *first_row*, *first_row* + 1, …; they are visible together.

        Raises:
            ValueError: *first_row* is not the next row, or the shape is wrong.
        """
        if first_row != len(self):
            raise ValueError(f"row {first_row} is not the next row, {len(self)}")
        if vectors.ndim != 2 or vectors.shape[1] != self._dim:
            raise ValueError(f"vectors have shape {vectors.shape}, expected [n, {self._dim}]")
        done = 0
        while done < len(vectors):
            part = vectors[done : done + self._seal_rows - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if self._filled == self._seal_rows:
                self._seal()
        self._publish()

    def search(self, vector: Vector, limit: int, allowed: BitMap) -> tuple[Rows, Scores]:
        """
        Return the best rows of *allowed* and their cosines, best first, at most *limit*: exact.

        Raises ValueError when *vector* has not the index's dimension.
        """
        vector = self._checked(vector)
        segments = self._segments
        if len(allowed) <= _FEW_ROWS:
            rows = _members(allowed)
            return _best(rows, _inner_products(_gather(segments, rows, self._dim), vector), limit)
        found = []
        for segment in segments:
            count = allowed.range_cardinality(segment.start, segment.stop)
            if count == segment.stop - segment.start:
                found.append(segment.search(vector, limit, None))
            elif count:
                within = _members(allowed & BitMap(range(segment.start, segment.stop)))
                found.append(segment.search(vector, limit, within))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return _best(np.concatenate([rows for rows, _ in found]), np.concatenate([score for _, score in found]), limit)

    def score(self, vector: Vector, rows: Rows) -> Scores:
        """Return the exact cosine of *vector* with each of *rows*, in their order. Raises IndexError, ValueError."""
        return _inner_products(self.get(rows), self._checked(vector))

    def get(self, rows: Rows) -> Vectors:
        """Return the vectors of *rows*, shape [n, dim], in their order. Raises IndexError."""
        return _gather(self._segments, rows, self._dim)

    def _checked(self, vector: Vector) -> Vector:
        """Return *vector* as FAISS reads it, which is from a bare address."""
        if vector.shape != (self._dim,):
            raise ValueError(f"the vector has shape {vector.shape}, expected [{self._dim}]")
        return np.ascontiguousarray(vector, np.float32)

    def _seal(self) -> None:
        start = len(self._sealed) * self._seal_rows
        self._sealed = (*self._sealed, FlatSegment(start, self._chunk))
        self._chunk = np.empty((self._seal_rows, self._dim), np.float32)
        self._filled = 0

    def _publish(self) -> None:
        if not self._filled:
            self._segments = self._sealed
            return
        start = len(self._sealed) * self._seal_rows
        self._segments = (*self._sealed, TailSegment(start, self._chunk[: self._filled]))


class FlatSegment:
    """A sealed segment that FAISS searches exactly."""

    def __init__(self, start: int, vectors: Vectors) -> None:
        self.start = start
        self.stop = start + len(vectors)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)
        # FAISS's own copy, seen as an array: the vectors are in memory once, for as long as the index lives.
        self._vectors: Vectors = faiss.rev_swig_ptr(self._index.get_xb(), vectors.size).reshape(vectors.shape)

    def search(self, vector: Vector, limit: int, allowed: Rows | None) -> tuple[Rows, Scores]:
        """Return up to *limit* best rows, best first."""
        limit = min(limit, self.stop - self.start if allowed is None else len(allowed))
        parameters = None
        if allowed is not None:
            mask = np.zeros(self.stop - self.start, np.bool_)
            mask[allowed - self.start] = True
            selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
            parameters = faiss.SearchParameters(sel=selector)
        scores, labels = self._index.search(vector[np.newaxis], limit, params=parameters)
        found = labels[0] >= 0
        return labels[0][found] + self.start, scores[0][found]

    def get(self, rows: Rows) -> Vectors:
        """Return copies of the vectors of *rows*."""
        return self._vectors[rows - self.start]


class TailSegment:
    """The filled part of the tail as of one moment."""

    def __init__(self, start: int, vectors: Vectors) -> None:
        self.start = start
        self.stop = start + len(vectors)
        self._vectors = vectors

    def search(self, vector: Vector, limit: int, allowed: Rows | None) -> tuple[Rows, Scores]:
        """Return up to *limit* best rows, best first."""
        scores = _inner_products(self._vectors, vector)
        rows = np.arange(self.start, self.stop) if allowed is None else allowed
        return _best(rows, scores if allowed is None else scores[rows - self.start], limit)

    def get(self, rows: Rows) -> Vectors:
        """Return copies of the vectors of *rows*."""
        return self._vectors[rows - self.start]


def _gather(segments: Sequence[Segment], rows: Rows, dim: int) -> Vectors:
    """Return the vectors of *rows* from whichever segments have them."""
    if len(rows) and not 0 <= rows.min() <= rows.max() < (segments[-1].stop if segments else 0):
        raise IndexError("there is no such row")
    vectors = np.empty((len(rows), dim), np.float32)
    owner = np.searchsorted([segment.start for segment in segments], rows, side="right") - 1
    for number in np.unique(owner):
        mine = owner == number
        vectors[mine] = segments[number].get(rows[mine])
    return vectors


def _inner_products(vectors: Vectors, vector: Vector) -> Scores:
    """Return the inner product of each of *vectors* with *vector*, to the bit what FAISS's flat search gives."""
    scores = np.empty(len(vectors), np.float32)
    if len(vectors):
        # Unlike a NumPy product it never takes more threads than the caller's.
        faiss.fvec_inner_products_ny(
            faiss.swig_ptr(scores), faiss.swig_ptr(vector), faiss.swig_ptr(vectors), vectors.shape[1], len(vectors)
        )
    return scores


def _best(rows: Rows, scores: Scores, limit: int) -> tuple[Rows, Scores]:
    """Return the *limit* best, best first; of equal scores the lower row first."""
    if len(rows) > limit:
        cut = np.partition(scores, len(scores) - limit)[len(scores) - limit]
        rows, scores = rows[scores >= cut], scores[scores >= cut]
    order = np.lexsort((rows, -scores))[:limit]
    return rows[order], scores[order]


def _members(rows: BitMap) -> Rows:
    return np.frombuffer(rows.to_array(), np.uint32).astype(np.int64)
