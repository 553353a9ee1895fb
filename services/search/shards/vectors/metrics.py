"""Scores of the three metrics, exact in float32, and the one place where FAISS is imported."""

from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from services.search.ports import Metric, Vector

# Its stubs know neither the Python layer's keyword arguments nor the functions on raw arrays.
faiss: Any = _faiss

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
Vectors = NDArray[np.float32]

# Rows gathered at a time from a file: a bound on the memory of one exact search.
GATHERED_ROWS = 4096


def use_one_thread() -> None:
    """Make FAISS work in the calling thread alone: one query is one thread, and queries run side by side."""
    faiss.omp_set_num_threads(1)


def faiss_metric(metric: Metric) -> int:
    """Return FAISS's number of *metric*; a cosine is the inner product of vectors that come normalised."""
    number: int = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    return number


def score_all(metric: Metric, vectors: Vectors, vector: Vector) -> Scores:
    """Return the score of each of *vectors* (C-contiguous, [n, dim]) with *vector*: higher is better."""
    scores = np.empty(len(vectors), np.float32)
    if len(vectors):
        # Unlike a NumPy product these never take more threads than the caller's.
        function = faiss.fvec_L2sqr_ny if metric == "l2" else faiss.fvec_inner_products_ny
        pointers = map(faiss.swig_ptr, (scores, vector, vectors))
        function(*pointers, vectors.shape[1], len(vectors))
        if metric == "l2":
            np.negative(scores, out=scores)
    return scores


def best(rows: Rows, scores: Scores, limit: int) -> tuple[Rows, Scores]:
    """Return the *limit* best, best first; of equal scores the lower row first."""
    if len(rows) > limit:
        cut = np.partition(scores, len(scores) - limit)[len(scores) - limit]
        rows, scores = rows[scores >= cut], scores[scores >= cut]
    order = np.lexsort((rows, -scores))[:limit]
    return rows[order], scores[order]
