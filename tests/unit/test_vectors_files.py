"""The files of a vector index: written whole or not at all, the same answers after a restart, damage is noticed."""

import errno
import json

import numpy as np
import pytest
from pyroaring import BitMap

from services.search.shards import files
from services.search.shards.files import Damaged
from services.search.shards.vectors import VectorIndex, VectorOptions

OPTIONS = VectorOptions(tail_rows=64, hnsw_rows=256, ivf_rows=700)
COMPACT = VectorOptions(tail_rows=64, compact=True)


class GivenUp(Exception):
    """The builder was told to stop."""


def some_vectors(count, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def maintain(index, live):
    while job := index.due(live, idle=True):
        index.swap(job, index.build(job, live, lambda: None))


def an_index(directory, count, options=OPTIONS, *, dead=()):
    """Return an index with sealed segments, an unwritten flat one and a tail, and its live rows."""
    index = VectorIndex(16, "cosine", directory, options)
    vectors = some_vectors(count)
    live = BitMap(range(count)) - BitMap(dead)
    index.add(0, vectors[: count - 100])
    maintain(index, live)
    index.add(count - 100, vectors[count - 100 :])
    return index, live


@pytest.mark.parametrize("options", [OPTIONS, COMPACT])
@pytest.mark.parametrize("count", [150, 500, 1000])
def test_a_loaded_index_answers_as_the_frozen_one(tmp_path, options, count):
    """The state survives JSON, and all answers, exact ones too, are the same to the bit."""
    index, live = an_index(tmp_path, count, options, dead=range(0, count, 3))
    state, names = index.freeze()
    loaded = VectorIndex.load(16, "cosine", tmp_path, options, json.loads(json.dumps(state)))
    assert len(loaded) == count
    assert sorted(names) == sorted(state["files"])
    assert loaded.segments() == index.segments()
    for query in some_vectors(10, seed=3):
        for exact in (False, True):
            one = index.view().search(query, 10, live, exact=exact)
            other = loaded.view().search(query, 10, live, exact=exact)
            assert one.rows.tolist() == other.rows.tolist()
            assert one.scores.tolist() == other.scores.tolist()
    loaded.add(count, some_vectors(5, seed=9))
    assert len(loaded) == count + 5


def test_freezing_again_writes_nothing_new(tmp_path):
    """Without changes the same files are named; after an add only the tail's is another."""
    index, _ = an_index(tmp_path, 500)
    state, names = index.freeze()
    assert index.freeze() == (state, names)
    index.add(500, some_vectors(1))
    assert len(set(index.freeze()[1]) ^ set(names)) == 2


def test_collect_keeps_what_is_asked_for_and_what_is_used(tmp_path):
    """Files of older states go when nobody names them any more; an older state that is kept can still be loaded."""
    index, live = an_index(tmp_path, 500)
    state, names = index.freeze()
    index.add(500, some_vectors(300, seed=4))
    live.add_range(500, 800)
    maintain(index, live)
    index.collect(names)
    assert len(VectorIndex.load(16, "cosine", tmp_path, OPTIONS, state)) == 500
    newer, needed = index.freeze()
    index.collect([])
    assert {path.name for path in tmp_path.iterdir()} == set(needed)
    assert len(VectorIndex.load(16, "cosine", tmp_path, OPTIONS, newer)) == 800
    with pytest.raises(Damaged):
        VectorIndex.load(16, "cosine", tmp_path, OPTIONS, state)


def _missing(path):
    path.unlink()


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def _altered(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_missing, _truncated, _altered])
@pytest.mark.parametrize("options", [OPTIONS, COMPACT])
def test_each_damaged_file_is_named(tmp_path, harm, options):
    """Whichever file is missing, shorter or one bit different: loading says which it is."""
    index, _ = an_index(tmp_path, 500, options, dead=range(0, 500, 3))
    state, names = index.freeze()
    assert len(names) >= 4  # row numbers, vectors or codes, flat segments, the tail
    for name in names:
        kept = (tmp_path / name).read_bytes()
        harm(tmp_path / name)
        with pytest.raises(Damaged, match=name):
            VectorIndex.load(16, "cosine", tmp_path, options, state)
        (tmp_path / name).write_bytes(kept)
    VectorIndex.load(16, "cosine", tmp_path, options, state)


def test_a_state_of_another_index_is_refused(tmp_path):
    """Another dimension or metric, and a state that is no state, are damage and not an answer."""
    index, _ = an_index(tmp_path, 300)
    state, _names = index.freeze()
    with pytest.raises(Damaged, match="dimension 16"):
        VectorIndex.load(8, "cosine", tmp_path, OPTIONS, state)
    with pytest.raises(Damaged, match="metric cosine"):
        VectorIndex.load(16, "l2", tmp_path, OPTIONS, state)
    for broken in ({}, {**state, "segments": [{}]}, {**state, "rows": 7}, {**state, "files": {}}):
        with pytest.raises(Damaged):
            VectorIndex.load(16, "cosine", tmp_path, OPTIONS, broken)


@pytest.mark.parametrize("rows", [150, 600, 1000])
def test_a_build_that_is_given_up_leaves_no_files(tmp_path, rows):
    """Wherever the pace ends the work, the directory is as it was, and the index answers as before."""
    index, live = an_index(tmp_path, rows + 100)
    before = {path.name for path in tmp_path.iterdir()}
    job = index.due(live, idle=True)
    for allowed_steps in range(0, 60, 3):
        steps = iter(range(allowed_steps))

        def pace(steps=steps):
            if next(steps, None) is None:
                raise GivenUp

        try:
            index.build(job, live, pace)
        except GivenUp:
            assert {path.name for path in tmp_path.iterdir()} == before
        else:
            break
    assert index.view().search(some_vectors(1)[0], 1, live).rows.tolist() == [0]


def test_a_full_disk_costs_no_rows(tmp_path):
    """Neither a build nor a freeze that cannot write changes the index; afterwards both work."""

    class Full(files.Disk):
        def write(self, path, data):
            raise OSError(errno.ENOSPC, "no space left on device")

        def sync(self, path):
            raise OSError(errno.EIO, "input/output error")

    index, live = an_index(tmp_path, 500)
    before = {path.name for path in tmp_path.iterdir()}
    with files.replaced_by(Full()):
        job = index.due(live, idle=True)
        with pytest.raises(OSError):
            index.build(job, live, lambda: None)
        with pytest.raises(OSError):
            index.freeze()
    index.collect(before)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert index.view().search(some_vectors(1)[0], 1, live).rows.tolist() == [0]
    state, _ = index.freeze()
    assert len(VectorIndex.load(16, "cosine", tmp_path, OPTIONS, state)) == 500


def test_a_merge_of_what_is_gone_changes_nothing(tmp_path):
    """A job whose segments were written by a freeze meanwhile is dropped, and its file is collected."""
    index, live = an_index(tmp_path, 500)
    job = index.due(live, idle=True)
    built = index.build(job, live, lambda: None)
    _, names = index.freeze()
    index.swap(job, built)
    assert index.freeze()[1] == names
    index.collect([])
    assert {path.name for path in tmp_path.iterdir()} == set(names)
