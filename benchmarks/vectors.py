"""Vectors to search: clustered as embeddings are, with fields to filter by, words, and the exact answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIM = 384
LIMIT = 10

_CENTRES = 1000
_SPREAD = 0.7  # Length of the noise beside a centre of length 1: neighbours are near, and not all in one cluster.
_WORDS = 20_000
_WORDS_PER_TEXT = 60
_SLICE = 50_000

Condition = tuple[str, int] | None
FILTERS: dict[str, Condition] = {"no filter": None, "10 % filter": ("tenth", 3), "1 % filter": ("hundredth", 33)}


def fields(row: int) -> dict[str, int]:
    """Return the filtered fields of a row: each value of `tenth` has 10 % of the rows, each of `hundredth` 1 %."""
    return {"tenth": row * 7 % 10, "hundredth": row * 7 % 100}


def selected(rows: int, condition: Condition) -> NDArray[np.int64]:
    """Return the rows that *condition* selects among the first *rows*."""
    everything = np.arange(rows)
    if condition is None:
        return everything
    field, value = condition
    chosen: NDArray[np.int64] = everything[everything * 7 % {"tenth": 10, "hundredth": 100}[field] == value]
    return chosen


@dataclass(frozen=True, slots=True)
class VectorSet:
    """Files of unit vectors, float32: *vectors* [n, DIM], memory-mapped, and *queries* [m, DIM]."""

    vectors_file: Path
    queries_file: Path

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Return the vectors."""
        found: NDArray[np.float32] = np.load(self.vectors_file, mmap_mode="r")
        return found

    @property
    def queries(self) -> NDArray[np.float32]:
        """Return the queries."""
        found: NDArray[np.float32] = np.load(self.queries_file)
        return found

    def truth(self, rows: int, condition: Condition, queries: int) -> list[set[int]]:
        """Return the LIMIT best of the first *rows* that *condition* selects, exactly, for the first *queries*."""
        allowed = selected(rows, condition)
        asked = self.queries[:queries]
        best_scores = np.full((queries, 0), 0, np.float32)
        best_rows = np.empty((queries, 0), np.int64)
        for start in range(0, len(allowed), _SLICE):
            part = allowed[start : start + _SLICE]
            scores = np.hstack([best_scores, asked @ np.asarray(self.vectors[part]).T])
            rows_so_far = np.hstack([best_rows, np.broadcast_to(part, (queries, len(part)))])
            order = np.argsort(-scores, axis=1)[:, :LIMIT]
            best_scores = np.take_along_axis(scores, order, 1)
            best_rows = np.take_along_axis(rows_so_far, order, 1)
        return [set(row.tolist()) for row in best_rows]


def make(directory: Path, rows: int, *, queries: int, seed: int = 7) -> VectorSet:
    """Write *rows* vectors and *queries* questions of the same distribution into *directory*."""
    random = np.random.default_rng(seed)
    centres = _unit(random.standard_normal((_CENTRES, DIM), dtype=np.float32))
    made = VectorSet(directory / "vectors.npy", directory / "queries.npy")
    file = np.lib.format.open_memmap(made.vectors_file, "w+", np.float32, (rows, DIM))
    for start in range(0, rows, _SLICE):
        stop = min(start + _SLICE, rows)
        file[start:stop] = _near(centres, stop - start, random)
    file.flush()
    np.save(made.queries_file, _near(centres, queries, random))
    return made


def texts(first: int, count: int) -> list[str]:
    """Return the texts of rows *first* and on: words drawn by Zipf's law, so that BM25 has common and rare ones."""
    random = np.random.default_rng([11, first])
    numbers = np.minimum(random.zipf(1.3, (count, _WORDS_PER_TEXT)), _WORDS)
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def recall(found: Sequence[Sequence[int]], truth: Sequence[set[int]]) -> float:
    """Return which share of the exact answers was found."""
    wanted = sum(map(len, truth))
    return sum(len(set(rows) & exact) for rows, exact in zip(found, truth, strict=True)) / wanted if wanted else 1.0


def _near(centres: NDArray[np.float32], count: int, random: np.random.Generator) -> NDArray[np.float32]:
    noise = random.standard_normal((count, DIM), dtype=np.float32) * np.float32(_SPREAD / DIM**0.5)
    return _unit(centres[random.integers(0, len(centres), count)] + noise)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
