"""The vector index against a plain NumPy product, across segments, filters and concurrent writes."""

import threading

import numpy as np
import pytest
from pyroaring import BitMap

from services.search.shards.vectors import VectorIndex, use_one_thread

_DIM = 24


def unit_vectors(count, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, _DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(vectors, *, seal_rows, batch=37):
    index = VectorIndex(_DIM, seal_rows=seal_rows)
    for start in range(0, len(vectors), batch):
        index.add(start, vectors[start : start + batch])
    return index


def brute_force(vectors, query, limit, allowed):
    rows = np.array(sorted(allowed), np.int64)
    scores = vectors[rows] @ query
    order = np.lexsort((rows, -scores))[:limit]
    return rows[order], scores[order]


@pytest.mark.parametrize("count", [1, 99, 100, 101, 3000, 3050])
@pytest.mark.parametrize("share", [1.0, 0.95, 0.5, 0.02])
def test_search_equals_brute_force_over_the_allowed_rows(count, share):
    """Whatever the number of segments and the share of live rows, the best rows come back in order."""
    vectors = unit_vectors(count)
    allowed = BitMap(np.flatnonzero(np.random.default_rng(1).random(count) < share).tolist())
    index = filled(vectors, seal_rows=100)
    for query in unit_vectors(5, seed=2):
        rows, scores = index.search(query, 10, allowed)
        expected_rows, expected_scores = brute_force(vectors, query, 10, allowed)
        assert rows.tolist() == expected_rows.tolist()
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        assert rows.dtype == np.int64
        assert scores.dtype == np.float32


def test_equal_scores_are_in_row_order():
    """Copies of one vector come back lowest row first, whichever segment they are in."""
    vectors = np.repeat(unit_vectors(1), 1500, axis=0)
    index = filled(vectors, seal_rows=100)
    assert index.search(vectors[0], 5, BitMap(range(50, 1500)))[0].tolist() == [50, 51, 52, 53, 54]


def test_scores_of_given_rows_are_those_of_the_search():
    """`score` gives to the bit what `search` gave, sealed or not, in the order asked for."""
    vectors = unit_vectors(1550)
    index = filled(vectors, seal_rows=100)
    rows, scores = index.search(vectors[3], 1550, BitMap(range(1550)))
    shuffled = np.random.default_rng(0).permutation(1550)
    assert np.array_equal(index.score(vectors[3], rows[shuffled]), scores[shuffled])


def test_vectors_come_back_unchanged():
    """`get` returns the vectors that were added, in the order of the rows asked for."""
    vectors = unit_vectors(250)
    rows = np.array([249, 0, 100, 99, 100], np.int64)
    assert np.array_equal(filled(vectors, seal_rows=100).get(rows), vectors[rows])


def test_one_large_batch_spans_segments():
    """A batch larger than several segments is stored whole."""
    vectors = unit_vectors(730)
    index = filled(vectors, seal_rows=100, batch=730)
    assert len(index) == 730
    assert np.array_equal(index.get(np.arange(730)), vectors)


def test_an_empty_index_finds_nothing():
    """Without rows, or without allowed rows, the answer is empty."""
    query = unit_vectors(1)[0]
    assert [len(part) for part in VectorIndex(_DIM).search(query, 10, BitMap())] == [0, 0]
    assert [len(part) for part in filled(unit_vectors(700), seal_rows=100).search(query, 10, BitMap())] == [0, 0]


def test_wrong_shapes_and_rows_are_refused():
    """Nothing of another dimension, out of sequence or out of range reaches FAISS, which would read past its end."""
    index = filled(unit_vectors(10), seal_rows=100)
    with pytest.raises(ValueError, match="shape"):
        index.add(10, np.zeros((1, _DIM + 1), np.float32))
    with pytest.raises(ValueError, match="next row"):
        index.add(11, unit_vectors(1))
    with pytest.raises(ValueError, match="shape"):
        index.search(np.zeros(_DIM - 1, np.float32), 1, BitMap([0]))
    for row in (-1, 10):
        with pytest.raises(IndexError):
            index.get(np.array([row], np.int64))


def test_searching_while_rows_are_added_never_returns_garbage():
    """A search during writes returns rows that were published, with their true scores."""
    vectors = unit_vectors(6000)
    index = VectorIndex(_DIM, seal_rows=256)
    query = vectors[0]
    truth = vectors @ query
    failures = []

    def read():
        use_one_thread()
        try:
            while (count := len(index)) < len(vectors):
                rows, scores = index.search(query, 20, BitMap(range(count)))
                assert len(rows) == min(20, count)
                np.testing.assert_allclose(scores, truth[rows], atol=1e-6)
        except Exception as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for start in range(0, len(vectors), 7):
        index.add(start, vectors[start : start + 7])
    for reader in readers:
        reader.join()
    assert failures == []
