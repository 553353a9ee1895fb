"""
Fitting a projection to fewer dimensions, and what it loses. Pure functions of unit-length vectors.

The projection is the best of its rank for the vectors as they are, the mean left in: the leading eigenvectors of
their second moments (Eckart and Young, 1936), which keep the inner products that a search compares by. Subtracting
the mean, as a PCA of scattered points would, changes every cosine and ranks worse: on SciFact, fitted on all its texts,
at 128 of all-MiniLM-L6-v2's 384 dimensions nDCG@10 .610 against .639, the whole vectors having .646; centred
components without the subtraction have .632.
"""

from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures import nDCG
from numpy.typing import NDArray

from services.common.encoders import Projection
from services.embedding.offline.console import OfflineError

Vectors = NDArray[np.float32]

NEIGHBOURS = 10
_NDCG = nDCG @ NEIGHBOURS
_DEPTH = 100
_ROWS_AT_ONCE = 256
# Of the largest eigenvalue: less is rounding of float32 vectors, not a direction that texts differ in.
_NEGLIGIBLE = 1e-9


def fit(vectors: Vectors, dimensions: int) -> tuple[Projection, float]:
    """
    Return the projection of *vectors*, float32 [n, dim] of unit length, to *dimensions*, and the variance it keeps.

    The variance kept is the share of squared length, 0 to 1. The same vectors give the same projection: each
    component's largest element is positive.

    Raises:
        OfflineError: The vectors span fewer dimensions.
    """
    exact = vectors.astype(np.float64)
    values, columns = np.linalg.eigh(exact.T @ exact / len(exact))
    values, components = values[::-1], columns[:, ::-1].T
    spanned = int((values > _NEGLIGIBLE * values[0]).sum())
    if spanned < dimensions:
        raise OfflineError(f"the texts differ in {spanned} dimensions only: more varied texts, or fewer dimensions")
    kept = components[:dimensions]
    largest = np.abs(kept).argmax(axis=1)
    kept = kept * np.sign(kept[np.arange(dimensions), largest])[:, None]
    share = float(values[:dimensions].sum() / values.sum())
    return Projection(np.zeros(vectors.shape[1], dtype=np.float32), kept.astype(np.float32)), share


def apply(projection: Projection, vectors: Vectors) -> Vectors:
    """Return *vectors* through *projection*, of unit length again."""
    return unit(np.matmul(vectors - projection.mean, projection.components.T, dtype=np.float32))


def unit(vectors: Vectors) -> Vectors:
    """Return *vectors* at unit length; a vector of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled


def recall(whole: Vectors, reduced: Vectors, asked: Sequence[int]) -> float:
    """
    Return which share of the ten texts nearest to each of *asked* (rows) in *whole* is nearest in *reduced* too.

    By exact search over all rows, the one asked with left out.
    """
    shares = []
    for start in range(0, len(asked), _ROWS_AT_ONCE):
        rows = np.array(asked[start : start + _ROWS_AT_ONCE])
        pairs = zip(_neighbours(whole, rows), _neighbours(reduced, rows), strict=True)
        shares += [len(set(left) & set(right)) / len(left) for left, right in pairs]
    return float(np.mean(shares))


def _neighbours(vectors: Vectors, rows: NDArray[np.int64]) -> list[list[int]]:
    scores = vectors[rows] @ vectors.T
    scores[np.arange(len(rows)), rows] = -np.inf
    count = min(NEIGHBOURS, len(vectors) - 1)
    return [list(map(int, found)) for found in np.argpartition(-scores, count - 1, axis=1)[:, :count]]


def ndcg(
    documents: Vectors, ids: Sequence[str], queries: Mapping[str, Vectors], grades: Mapping[str, Mapping[str, int]]
) -> float:
    """Return the mean nDCG@10 of *queries*, vectors of shape [dim] by id, by exact search over *documents*."""
    run = {}
    for query, vector in queries.items():
        scores = documents @ vector
        best = np.argsort(-scores, kind="stable")[:_DEPTH]
        run[query] = {ids[row]: float(scores[row]) for row in best}
    judged = {query: dict(grades[query]) for query in queries}
    return float(ir_measures.calc_aggregate([_NDCG], judged, run)[_NDCG])
