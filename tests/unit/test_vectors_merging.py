"""Merges that extend a graph instead of building it anew: the same answers, clean files, and little work for many rows."""

from dataclasses import dataclass

import numpy as np
import pytest
from pyroaring import BitMap

from services.search.shards.vectors import VectorIndex, VectorOptions, building, codes, use_one_thread
from services.search.shards.vectors.tiers import due

DIM = 24
OPTIONS = VectorOptions(tail_rows=128, hnsw_rows=512)


class GivenUp(Exception):
    """The builder was told to stop."""


@pytest.fixture(autouse=True)
def _one_thread():
    use_one_thread()


@pytest.fixture
def added(monkeypatch):
    """How many rows were added to graphs, by the graph's size afterwards."""
    counts = []

    def counting(index, count, read, pace):
        before = index.ntotal
        add_to_graph(index, count, read, pace)
        counts.append((count, count - before))

    add_to_graph = codes.add_to_graph
    for module in (codes, building):
        monkeypatch.setattr(module, "add_to_graph", counting)
    return counts


def some_vectors(count, *, seed=0, metric="cosine"):
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(99).standard_normal((40, DIM))
    vectors = middles[random.integers(0, 40, count)] + 0.7 * random.standard_normal((count, DIM))
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def maintain(index, live, *, idle):
    while job := index.due(live, idle=idle):
        index.swap(job, index.build(job, live, lambda: None))


def recall(metric, view, vectors, allowed):
    rows = np.array(allowed)
    hits = 0
    for query in some_vectors(40, seed=5, metric=metric):
        scores = -((vectors[rows] - query) ** 2).sum(1) if metric == "l2" else vectors[rows] @ query
        answer = view.search(query, 10, allowed)
        assert set(answer.rows.tolist()) <= set(allowed)
        hits += len(set(answer.rows) & set(rows[np.argsort(-scores)[:10]]))
    return hits / 400


def extended(directory, *, metric="cosine", dead=()):
    """Return an index whose graph of 1,024 rows is about to be extended by 1,024 others, with rows and live rows."""
    vectors = some_vectors(2048, metric=metric)
    index = VectorIndex(DIM, metric, directory, OPTIONS)
    index.add(0, vectors[:1024])
    maintain(index, BitMap(range(1024)), idle=True)
    assert index.segments() == {"hnsw": 1024}
    index.add(1024, vectors[1024:])
    live = BitMap(range(2048)) - BitMap(dead)
    sealing = index.due(live, idle=False)
    index.swap(sealing, index.build(sealing, live, lambda: None))
    return index, vectors, live


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_an_extended_graph_finds_what_brute_force_finds(tmp_path, metric, added):
    """Only the new rows are added to the graph, and old and new ones are found, with filters and after a restart."""
    index, vectors, live = extended(tmp_path, metric=metric, dead=range(0, 1024, 20))
    maintain(index, live, idle=False)
    assert added == [(1024, 1024), (2048, 1024)]
    assert index.segments() == {"hnsw": 2048}
    assert recall(metric, index.view(), vectors, live) >= 0.95
    assert recall(metric, index.view(), vectors, BitMap(range(3, 2048, 3)) & live) >= 0.95
    np.testing.assert_array_equal(index.view().get(np.arange(2048)), vectors)
    loaded = VectorIndex.load(DIM, metric, tmp_path, OPTIONS, index.freeze()[0])
    assert recall(metric, loaded.view(), vectors, live) >= 0.95


def test_many_small_extensions_find_what_one_build_finds(tmp_path, added):
    """Rows that come a few at a time, and are deleted now and then, leave a graph as good as one built at once."""
    vectors = some_vectors(6000)
    index = VectorIndex(DIM, "cosine", tmp_path, OPTIONS)
    live = BitMap()
    for start in range(0, 6000, 300):
        index.add(start, vectors[start : start + 300])
        live.add_range(start, start + 300)
        live -= BitMap(range(start, start + 300, 50))
        maintain(index, live, idle=False)
        index.collect([])
    assert sum(count for _, count in added) <= 3 * 6000
    assert recall("cosine", index.view(), vectors, live) >= 0.95
    maintain(index, live, idle=True)
    assert recall("cosine", index.view(), vectors, live) >= 0.95


def test_an_idle_index_takes_its_tail_into_the_graph(tmp_path):
    """Once there is nothing else to do no row is compared one by one, unless a graph is large beside those few."""
    vectors = some_vectors(2100)
    index = VectorIndex(DIM, "cosine", tmp_path, OPTIONS)
    index.add(0, vectors[:2048])
    maintain(index, BitMap(range(2048)), idle=True)
    index.add(2048, vectors[2048:2050])
    maintain(index, BitMap(range(2050)), idle=True)
    assert index.segments() == {"hnsw": 2048, "tail": 2}
    index.add(2050, vectors[2050:])
    live = BitMap(range(2100))
    maintain(index, live, idle=False)
    assert index.segments() == {"hnsw": 2048, "tail": 52}
    maintain(index, live, idle=True)
    assert index.segments() == {"hnsw": 2100}
    assert recall("cosine", index.view(), vectors, live) >= 0.95
    np.testing.assert_array_equal(index.view().get(np.arange(2100)), vectors)


def test_a_graph_with_many_dead_rows_is_built_anew(tmp_path, added):
    """From a tenth of dead rows a merge drops them; below, they stay in the graph and are never found."""
    index, _, live = extended(tmp_path, dead=range(120))
    maintain(index, live, idle=False)
    assert added == [(1024, 1024), (1928, 1928)]
    assert index.segments() == {"hnsw": 1928}


def test_rows_beyond_a_graphs_bounds_make_it_be_built_anew(tmp_path, added):
    """A graph codes values between the bounds that it was made with; what lies far outside gets a graph that fits."""
    index = VectorIndex(DIM, "l2", tmp_path, OPTIONS)
    vectors = np.concatenate([some_vectors(1024, metric="l2"), 5.0 * some_vectors(1024, metric="l2", seed=1)])
    live = BitMap(range(1024))
    index.add(0, vectors[:1024])
    maintain(index, live, idle=True)
    index.add(1024, vectors[1024:])
    live.add_range(1024, 2048)
    maintain(index, live, idle=False)
    assert added == [(1024, 1024), (2048, 2048)]
    assert recall("l2", index.view(), vectors, live) >= 0.95


def test_an_extension_that_is_given_up_leaves_no_files(tmp_path):
    """Wherever the pace ends it, in the middle of writing a file too, the directory and the answers are as before."""
    index, vectors, live = extended(tmp_path, dead=[7])
    before = {path.name for path in tmp_path.iterdir()}
    answer = index.view().search(vectors[3], 10, live)
    job = index.due(live, idle=False)
    assert job.purpose == "merge"
    given_up = 0
    for allowed_steps in range(0, 200, 2):
        steps = iter(range(allowed_steps))

        def pace(steps=steps):
            if next(steps, None) is None:
                raise GivenUp

        try:
            index.build(job, live, pace)
        except GivenUp:
            given_up += 1
            assert {path.name for path in tmp_path.iterdir()} == before
        else:
            break
    assert given_up > 5
    again = index.view().search(vectors[3], 10, live)
    assert (again.rows.tolist(), again.scores.tolist()) == (answer.rows.tolist(), answer.scores.tolist())
    index.collect(before)
    maintain(index, live, idle=False)
    assert recall("cosine", index.view(), vectors, live) >= 0.95


@dataclass
class Sized:
    """Rows of one kind, as `due` looks at them."""

    start: int
    stop: int
    kind: str
    files: dict

    def __len__(self):
        return self.stop - self.start

    def allowed(self, live):
        return live.range_cardinality(self.start, self.stop)


@pytest.mark.parametrize("chunks_at_once", [1, 16])
@pytest.mark.parametrize("rows", [100_000, 1_000_000])
def test_rows_are_added_to_graphs_seldom_and_segments_stay_few(rows, chunks_at_once):
    """With maintenance as rows come, each is added to less than 3 graphs, and copied in bulk some dozen times."""
    options = VectorOptions()
    segments, most, added, copied = [], 0, 0, 0
    live = BitMap(range(rows))
    starts = range(0, rows, options.tail_rows)
    for number, start in enumerate(starts, 1):
        segments.append(Sized(start, min(rows, start + options.tail_rows), "flat", {}))
        if number % chunks_at_once:
            continue
        while job := due(tuple(segments), live, options, idle=number > len(starts) - chunks_at_once):
            total, first = sum(map(len, job.segments)), job.segments[0]
            kind = "flat" if job.purpose == "seal" else options.kind(total)
            copied += total
            if kind == "hnsw":
                added += total - (len(first) if first.kind == "hnsw" else 0)
            at = segments.index(first)
            segments[at : at + len(job.segments)] = [Sized(first.start, job.segments[-1].stop, kind, {"f": {}})]
        most = max(most, len(segments))
    assert added < 2 * rows
    assert copied < 15 * rows
    assert most <= 6
