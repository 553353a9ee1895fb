"""FAISS indexes over one byte for each dimension, built in short steps from vectors that are read in slices."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from services.search.ports import Metric
from services.search.shards.vectors.metrics import Vectors, faiss, faiss_metric
from services.search.shards.vectors.planning import Kind, VectorOptions

Read = Callable[[int], Iterator[Vectors]]
Pace = Callable[[], None]
Bounds = tuple[Vectors, Vectors]

# One step of each kind of work takes some 10 to 50 ms with 384 dimensions.
_GRAPH_ROWS = 64
_CODED_ROWS = 4096
_ASSIGNED_ROWS = 512

_ROUNDS = 6
_SAMPLES_FOR_LIST = 40


def build_index(
    kind: Kind, metric: Metric, bounds: Bounds, count: int, read: Read, options: VectorOptions, pace: Pace
) -> Any:
    """
    Return an index of *kind* over the *count* vectors that *read* yields in slices of up to the rows it is given.

    *bounds* are the least and the greatest value in each dimension, between which the bytes are spread.
    """
    dim, number = len(bounds[0]), faiss_metric(metric)
    eight_bits = faiss.ScalarQuantizer.QT_8bit
    if kind == "ivf":
        return _build_lists(dim, metric, bounds, count, read, pace)
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(dim, eight_bits, options.hnsw_links, number)
        index.hnsw.efConstruction = options.ef_construction
        _set_bounds(faiss.downcast_index(index.storage), bounds)
    else:
        index = faiss.IndexScalarQuantizer(dim, eight_bits, number)
        _set_bounds(index, bounds)
    index.is_trained = True
    if kind == "hnsw":
        add_to_graph(index, count, read, pace)
        return index
    for vectors in read(_CODED_ROWS):
        index.add(vectors)
        pace()
    return index


def add_to_graph(index: Any, count: int, read: Read, pace: Pace) -> None:
    """Add what *read* yields to a graph, which will have *count* vectors then."""
    links = index.hnsw.nb_neighbors(0) + 2  # with those of the upper levels
    # Room for all at once: growing by doubling, it would take twice as much, and three times while it is copied.
    for grown, size in ((faiss.downcast_index(index.storage).codes, index.d), (index.hnsw.neighbors, links)):
        done = grown.size()
        grown.resize(max(done, count * size))
        grown.resize(done)
    for vectors in read(_GRAPH_ROWS):
        index.add(vectors)
        pace()


def clamped_share(index: Any, vectors: Iterable[Vectors]) -> float:
    """
    Return by what a graph's codes lose more of *vectors* for their bounds, relative to what rounding loses.

    It is the sum of squared distances to the bounds of the values outside of them, divided by that of rounding
    evenly spread values to the nearest of 256: a twelfth of the squared step for each.
    """
    least, greatest = bounds_of(faiss.downcast_index(index.storage))
    rounding = float(((greatest - least) / 255) @ ((greatest - least) / 255)) / 12
    outside = rows = 0.0
    for part in vectors:
        beyond = part - np.clip(part, least, greatest)
        outside += float(np.vdot(beyond, beyond))
        rows += len(part)
    return outside / max(rows * rounding, np.finfo(np.float64).tiny)


def bounds_of(index: Any) -> Bounds:
    """Return the bounds that a scalar quantiser's bytes are spread between."""
    trained = faiss.vector_to_array(index.sq.trained)
    least, width = np.split(trained, 2)
    return least, least + width


def _set_bounds(index: Any, bounds: Bounds) -> None:
    least, greatest = bounds
    trained = np.concatenate([least, greatest - least]).astype(np.float32)
    faiss.copy_array_to_vector(trained, index.sq.trained)
    index.is_trained = True


def _build_lists(dim: int, metric: Metric, bounds: Bounds, count: int, read: Read, pace: Pace) -> Any:
    """Return inverted lists: vectors are put to their nearest centre, queries ask the best centres by the metric."""
    lists = max(1, min(count, round(2 * math.sqrt(count))))
    centres = _centres(lists, count, read, pace, unit=metric == "cosine")
    nearest = faiss.IndexFlatL2(dim)
    nearest.add(centres)
    quantizer = faiss.IndexFlat(dim, faiss_metric(metric))
    quantizer.add(centres)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss_metric(metric), False
    )
    quantizer.this.disown()
    index.own_fields = True
    _set_bounds(index, bounds)
    done = 0
    for vectors in read(_ASSIGNED_ROWS):
        owners = np.ascontiguousarray(nearest.search(vectors, 1)[1][:, 0])
        numbers = np.arange(done, done + len(vectors), dtype=np.int64)
        pointers = map(faiss.swig_ptr, (vectors, numbers, owners))
        index.add_core(len(vectors), *pointers)
        done += len(vectors)
        pace()
    return index


def _centres(lists: int, count: int, read: Read, pace: Pace, *, unit: bool) -> Vectors:
    """Return *lists* centres by Lloyd's k-means over an evenly spread sample, in steps that *pace* may interrupt."""
    every = max(1, count // (lists * _SAMPLES_FOR_LIST))
    taken, seen = [], 0
    for vectors in read(_CODED_ROWS):
        taken.append(vectors[(-seen) % every :: every])
        seen += len(vectors)
        pace()
    sample = np.concatenate(taken)
    random = np.random.default_rng(0)
    centres = sample[np.sort(random.choice(len(sample), lists, replace=False))].copy()
    for _ in range(_ROUNDS):
        nearest = faiss.IndexFlatL2(sample.shape[1])
        nearest.add(centres)
        sums = np.zeros(centres.shape, np.float64)
        members = np.zeros(lists, np.int64)
        for at in range(0, len(sample), _ASSIGNED_ROWS):
            part = sample[at : at + _ASSIGNED_ROWS]
            owners = nearest.search(part, 1)[1][:, 0]
            np.add.at(sums, owners, part)
            np.add.at(members, owners, 1)
            pace()
        empty = members == 0
        centres = (sums / np.maximum(members, 1)[:, np.newaxis]).astype(np.float32)
        centres[empty] = sample[random.choice(len(sample), int(empty.sum()))]
        if unit:
            centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return centres
