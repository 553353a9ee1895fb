"""The vector index against plain NumPy: all metrics, segments of every kind, filters, maintenance, concurrent use."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from services.search.shards.vectors import VectorIndex, VectorOptions, use_one_thread

METRICS = ["cosine", "dot", "l2"]
DIM = 24
TINY = VectorOptions(tail_rows=8, hnsw_rows=32, ivf_rows=96, max_segment_rows=128)
SMALL = {"tail_rows": 256, "hnsw_rows": 1024}


@pytest.fixture(autouse=True)
def _one_thread():
    use_one_thread()


def some_vectors(count, *, metric="cosine", dim=DIM, seed=0, centres=40):
    """Return clustered vectors: of unit length for cosine, of different lengths for the others."""
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(99).standard_normal((centres, dim))
    vectors = middles[random.integers(0, centres, count)] + 0.7 * random.standard_normal((count, dim))
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def true_scores(metric, vectors, query):
    if metric == "l2":
        return -((vectors - query) ** 2).sum(1)
    return vectors @ query


def brute_force(metric, vectors, query, limit, allowed):
    rows = np.array(sorted(allowed), np.int64)
    scores = true_scores(metric, vectors[rows], query)
    order = np.lexsort((rows, -scores))[:limit]
    return rows[order], scores[order]


def maintain(index, live, *, idle=True, rounds=100):
    """Do all that is due, and return how much it was."""
    for done in range(rounds):
        job = index.due(live, idle=idle)
        if job is None:
            return done
        index.swap(job, index.build(job, live, lambda: None))
    raise AssertionError("maintenance does not come to an end")


def filled(directory, vectors, options, *, metric="cosine", batch=37):
    index = VectorIndex(vectors.shape[1], metric, directory, options)
    for start in range(0, len(vectors), batch):
        index.add(start, vectors[start : start + batch])
    return index


def recall(metric, view, vectors, allowed, *, limit=10, queries=40, **options):
    hits = []
    for query in some_vectors(queries, metric=metric, dim=vectors.shape[1], seed=5):
        wanted = brute_force(metric, vectors, query, limit, allowed)[0]
        found = view.search(query, limit, allowed, **options)
        assert set(found.rows.tolist()) <= set(allowed)
        assert len(found.rows) == min(limit, len(allowed))
        assert np.all(np.diff(found.scores) <= 0)
        hits.append(len(set(found.rows) & set(wanted)) / max(1, len(wanted)))
    return float(np.mean(hits))


@pytest.fixture(scope="module", params=["hnsw", "ivf"])
def sealed(request, tmp_path_factory):
    """One sealed segment of each approximate kind over the same 4,000 rows, and those rows."""
    use_one_thread()
    vectors = some_vectors(4000)
    ivf_rows = 10**9 if request.param == "hnsw" else 2048
    index = filled(tmp_path_factory.mktemp(request.param), vectors, VectorOptions(**SMALL, ivf_rows=ivf_rows))
    maintain(index, BitMap(range(4000)))
    assert index.segments() == ({"hnsw": 4000} if request.param == "hnsw" else {"ivf": 3840, "tail": 160})
    return index, vectors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, 99, 100, 101, 3050])
@pytest.mark.parametrize("share", [1.0, 0.95, 0.5, 0.02])
def test_flat_segments_give_what_numpy_gives(tmp_path, metric, count, share):
    """Whatever the number of segments and the share of allowed rows, the best rows come back in order."""
    vectors = some_vectors(count, metric=metric)
    allowed = BitMap(np.flatnonzero(np.random.default_rng(1).random(count) < share).tolist())
    view = filled(tmp_path, vectors, VectorOptions(tail_rows=100), metric=metric).view()
    for query in some_vectors(3, metric=metric, seed=2):
        answer = view.search(query, 10, allowed)
        rows, scores = brute_force(metric, vectors, query, 10, allowed)
        assert answer.rows.tolist() == rows.tolist()
        np.testing.assert_allclose(answer.scores, scores, rtol=1e-4, atol=1e-4)
        assert (answer.rows.dtype, answer.scores.dtype) == (np.int64, np.float32)
        assert answer.plan["vectors"] == "exact"


def test_equal_scores_are_in_row_order(tmp_path):
    """Copies of one vector come back lowest row first, whichever segment they are in."""
    vectors = np.repeat(some_vectors(1), 1500, axis=0)
    view = filled(tmp_path, vectors, VectorOptions(tail_rows=100)).view()
    assert view.search(vectors[0], 5, BitMap(range(50, 1500))).rows.tolist() == [50, 51, 52, 53, 54]


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_adds_deletes_and_maintenance_in_any_order_equal_brute_force(tmp_path_factory, metric, data):
    """Exact searches, scores and vectors are those of a plain array, whatever was sealed, merged and rebuilt."""
    index = VectorIndex(8, metric, tmp_path_factory.mktemp("v"), TINY)
    rows = np.empty((0, 8), np.float32)
    live = BitMap()
    for step in data.draw(st.lists(st.sampled_from(["add", "delete", "maintain", "idle", "reload"]), max_size=12)):
        if step == "add":
            new = some_vectors(data.draw(st.integers(1, 60)), metric=metric, dim=8, seed=len(rows))
            index.add(len(rows), new)
            live.add_range(len(rows), len(rows) + len(new))
            rows = np.concatenate([rows, new])
        elif step == "delete" and live:
            first = data.draw(st.integers(0, len(rows) - 1))
            live -= BitMap(range(first, first + data.draw(st.integers(1, 40))))
        elif step in ("maintain", "idle"):
            maintain(index, live, idle=step == "idle")
        elif step == "reload":
            index = VectorIndex.load(8, metric, index._directory, TINY, index.freeze()[0])
            index.collect([])
    assert len(index) == len(rows)
    view = index.view()
    query = some_vectors(1, metric=metric, dim=8, seed=77)[0]
    answer = view.search(query, 7, live, exact=True)
    wanted, scores = brute_force(metric, rows, query, 7, live)
    np.testing.assert_allclose(answer.scores, scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(true_scores(metric, rows[answer.rows], query), scores, rtol=1e-4, atol=1e-4)
    approximate = view.search(query, 7, live)
    assert len(approximate.rows) == len(wanted)
    np.testing.assert_allclose(
        approximate.scores, true_scores(metric, rows[approximate.rows], query), rtol=1e-4, atol=1e-4
    )
    every = np.array(live, np.int64)
    np.testing.assert_array_equal(view.get(every), rows[every])


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.1, 0.3, 0.6, 0.97, 0.995, 1.0])
def test_sealed_segments_find_the_nearest_at_every_selectivity(sealed, share):
    """Of what a filter allows nearly all of the best come back, with exact scores, and never anything else."""
    index, vectors = sealed
    allowed = BitMap(np.flatnonzero(np.random.default_rng(3).random(len(vectors)) < share).tolist())
    assert recall("cosine", index.view(), vectors, allowed) >= 0.97 or not allowed
    query = vectors[7]
    answer = index.view().search(query, 10, allowed)
    np.testing.assert_allclose(answer.scores, vectors[answer.rows] @ query, atol=1e-5)


def test_one_allowed_row_is_found(sealed):
    """A filter that leaves one row finds that row, wherever the query points."""
    index, vectors = sealed
    assert index.view().search(vectors[0], 10, BitMap([3777])).rows.tolist() == [3777]
    assert index.view().search(vectors[0], 0, BitMap([3777])).rows.tolist() == []


def test_an_exact_search_misses_nothing(sealed):
    """`exact` gives NumPy's answer from approximate segments too, and its plan says so."""
    index, vectors = sealed
    allowed = BitMap(range(0, 4000, 2))
    assert recall("cosine", index.view(), vectors, allowed, exact=True) == 1.0
    plan = index.view().search(vectors[0], 10, allowed, exact=True).plan
    assert (plan["vectors"], plan["exact_rows"], plan["beam"]) == ("exact", 2000, 0)


def test_dead_rows_that_lie_together_do_not_hide_the_live_ones(sealed):
    """When all neighbours of a query are dead, the nearest live rows are found all the same."""
    index, vectors = sealed
    near = np.argsort(-(vectors @ vectors[5]))[:60]
    live = BitMap(range(4000)) - BitMap(near.tolist())
    found = index.view().search(vectors[5], 10, live)
    wanted = brute_force("cosine", vectors, vectors[5], 10, live)[0]
    assert len(set(found.rows) & set(wanted)) >= 9


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_graphs_work_for_vectors_of_different_lengths(tmp_path, metric):
    """Inner products and distances are searched by graph with nearly the recall of cosines."""
    vectors = some_vectors(3000, metric=metric)
    index = filled(tmp_path, vectors, VectorOptions(**SMALL), metric=metric)
    live = BitMap(range(3000))
    maintain(index, live)
    assert index.view().search(vectors[0], 10, live).plan["beam"] > 0
    assert recall(metric, index.view(), vectors, live) >= 0.95


def test_a_compact_index_keeps_codes_only(tmp_path):
    """Its files are about a quarter of the float32 vectors, and it still finds nearly all of the best."""
    vectors = some_vectors(3000, dim=64)
    index = filled(tmp_path, vectors, VectorOptions(tail_rows=250, compact=True))
    live = BitMap(range(3000))
    for _ in range(3):  # Coding again what was decoded costs nothing between the same bounds.
        maintain(index, live)
        live -= BitMap(range(100)) if 0 in live else BitMap(range(0, 3000, 4))
    maintain(index, live)
    assert index.segments() == {"codes": len(live)}
    index.collect([])
    assert not list(tmp_path.glob("*.f32"))
    assert index.memory_bytes == 0
    assert index.disk_bytes < 0.35 * vectors.nbytes
    assert recall("cosine", index.view(), vectors, live) >= 0.95
    np.testing.assert_allclose(index.view().get(np.array(live)), vectors[np.array(live)], atol=0.01)


def test_a_view_never_changes(tmp_path):
    """What was added, merged and deleted later is not seen by a view made before, whose files may be gone."""
    vectors = some_vectors(2000)
    index = filled(tmp_path, vectors[:1500], VectorOptions(**SMALL))
    live = BitMap(range(1500))
    maintain(index, live)
    view = index.view()
    before = [view.search(query, 10, live) for query in vectors[:20]]
    index.add(1500, vectors[1500:])
    for _ in range(2):
        maintain(index, BitMap(range(1000, 2000)))
        index.collect([])
    for query, answer in zip(vectors[:20], before, strict=True):
        again = view.search(query, 10, live)
        assert again.rows.tolist() == answer.rows.tolist()
        assert again.scores.tolist() == answer.scores.tolist()


def test_a_row_that_does_not_exist_is_an_error(sealed):
    """Rows outside the index, vectors of another dimension and rows out of turn are refused."""
    index, vectors = sealed
    for rows in ([-1], [4000], [5, 4001]):
        with pytest.raises(IndexError):
            index.view().get(np.array(rows))
    with pytest.raises(ValueError, match="expected"):
        index.view().search(vectors[0][:5], 3, BitMap([1]))
    with pytest.raises(ValueError, match="next row"):
        index.add(3, vectors[:1])


def test_a_fifth_of_dead_rows_makes_a_rebuild_due(tmp_path):
    """Below it nothing is done; from it the dead are dropped, and asking for them is an error."""
    vectors = some_vectors(1024)
    index = filled(tmp_path, vectors, VectorOptions(**SMALL))
    live = BitMap(range(1024))
    maintain(index, live)
    assert index.due(BitMap(range(210, 1024)), idle=True) is not None
    assert index.due(BitMap(range(200, 1024)), idle=True) is None
    live -= BitMap(range(0, 1024, 3))
    assert maintain(index, live) == 1
    assert sum(index.segments().values()) == len(live)
    with pytest.raises(IndexError):
        index.view().get(np.array([3]))
    assert maintain(index, BitMap()) == 1
    assert index.segments() == {}
    assert len(index) == 1024


def test_readers_find_everything_while_segments_are_swapped(tmp_path):
    """While rows are added and segments are merged, each view finds each of its vectors as its own nearest."""
    vectors = some_vectors(6000, dim=32)
    index = VectorIndex(32, "cosine", tmp_path, VectorOptions(tail_rows=128, hnsw_rows=512))
    index.add(0, vectors[:100])
    shown = [(index.view(), 100)]
    wrong, done = [], threading.Event()

    def read(seed):
        use_one_thread()
        random = np.random.default_rng(seed)
        while not done.is_set():
            view, count = shown[-1]
            row = int(random.integers(count))
            if row not in view.search(vectors[row], 5, BitMap(range(count))).rows:
                wrong.append(row)

    lock = threading.Lock()

    def build():
        while not done.is_set():
            with lock:
                live = BitMap(range(len(index)))
                job = index.due(live, idle=False)
            if job is not None:
                built = index.build(job, live, lambda: None)
                with lock:
                    index.swap(job, built)
                    shown.append((index.view(), len(index)))
                index.collect([])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)] + [threading.Thread(target=build)]
    for thread in threads:
        thread.start()
    for start in range(100, 6000, 59):
        with lock:
            index.add(start, vectors[start : start + 59])
            shown.append((index.view(), len(index)))
    done.set()
    for thread in threads:
        thread.join()
    assert len(wrong) <= 2  # approximate segments may miss one
    np.testing.assert_array_equal(index.view().get(np.arange(6000)), vectors)
