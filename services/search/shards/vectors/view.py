"""The vectors of a shard as they were at one moment, searched by any thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from services.search.ports import Metric, Vector
from services.search.shards.vectors.metrics import GATHERED_ROWS, Rows, Scores, Vectors, best, score_all
from services.search.shards.vectors.planning import VectorOptions
from services.search.shards.vectors.segments import Segment, gather


@dataclass(frozen=True, slots=True)
class VectorAnswer:
    """
    The best rows and their scores, best first; of equal scores the lower row first.

    *plan*: "vectors" is how they were found (exact, hnsw, ivf, codes, or mixed), "segments" the rows of each kind that
    were searched, "beam" the widest one, "widened" whether the filter widened it, "exact_rows" how many were scored
    exactly.
    """

    rows: Rows
    scores: Scores
    plan: dict[str, Any]


class VectorView:
    """
    An index as of one moment; it never changes and needs no lock.

    Scores are cosines (of vectors that come normalised), inner products, or for l2 negative squared distances: exact
    float32 values, but for those of a compact index.
    """

    def __init__(self, dim: int, metric: Metric, segments: tuple[Segment, ...], options: VectorOptions) -> None:
        """Look at *segments*, in the order of their rows."""
        self._dim = dim
        self._metric = metric
        self._segments = segments
        self._options = options

    def search(self, vector: Vector, limit: int, allowed: BitMap, *, exact: bool = False) -> VectorAnswer:
        """
        Return the best rows of *allowed*, at most *limit*.

        No fewer than *limit* come back where so many are allowed. With *exact* every allowed row is scored.
        Raises ValueError when *vector* has not the index's dimension.
        """
        vector = self._checked(vector)
        answer = self._search(vector, limit, allowed, exact=exact)
        if len(answer.rows) < min(limit, len(allowed)) and not exact:
            return self._search(vector, limit, allowed, exact=True)
        return answer

    def score(self, vector: Vector, rows: NDArray[np.integer[Any]] | Sequence[int]) -> Scores:
        """Return the score of *vector* with each of *rows*, in their order. Raises IndexError, ValueError."""
        vector, numbers = self._checked(vector), np.asarray(rows, np.int64)
        if len(numbers) <= GATHERED_ROWS:
            return score_all(self._metric, self.get(numbers), vector)
        starts = range(0, len(numbers), GATHERED_ROWS)
        parts = [score_all(self._metric, self.get(numbers[at : at + GATHERED_ROWS]), vector) for at in starts]
        return np.concatenate(parts)

    def get(self, rows: NDArray[np.integer[Any]] | Sequence[int]) -> Vectors:
        """Return copies of the vectors of *rows*, shape [n, dim], in their order. Raises IndexError."""
        return gather(self._segments, np.asarray(rows, np.int64), self._dim)

    def _checked(self, vector: Vector) -> Vector:
        """Return *vector* as FAISS reads it, which is from a bare address."""
        if vector.shape != (self._dim,):
            raise ValueError(f"the vector has shape {vector.shape}, expected [{self._dim}]")
        return np.ascontiguousarray(vector, np.float32)

    def _search(self, vector: Vector, limit: int, allowed: BitMap, *, exact: bool) -> VectorAnswer:
        rows: list[Rows] = [np.empty(0, np.int64)]
        scores: list[Scores] = [np.empty(0, np.float32)]
        searched: dict[str, int] = {}
        ways: set[str] = set()
        beam = exact_rows = 0
        widened = False
        for segment in self._segments if limit > 0 else ():
            count = segment.allowed(allowed)
            if not count:
                continue
            found, values, plan = segment.search(vector, limit, allowed, self._options, exact=exact)
            rows.append(found)
            scores.append(values)
            searched[segment.kind] = searched.get(segment.kind, 0) + count
            beam, widened = max(beam, plan.beam), widened or plan.widened
            if plan.way in ("gather", "flat"):
                ways.add("exact")
                exact_rows += count
            else:
                ways.add(segment.kind if plan.way == "beam" else "codes")
        merged = best(np.concatenate(rows), np.concatenate(scores), limit)
        return VectorAnswer(*merged, _described(ways, searched, beam, exact_rows, widened=widened))


def _described(
    ways: set[str], searched: Mapping[str, int], beam: int, exact_rows: int, *, widened: bool
) -> dict[str, Any]:
    return {
        "vectors": "exact" if not ways else next(iter(ways)) if len(ways) == 1 else "mixed",
        "segments": dict(searched),
        "beam": beam,
        "widened": widened,
        "exact_rows": exact_rows,
    }
