"""Copies of a shard's snapshot beside the shard that goes on: what they hold, and when there is none."""

import pytest

from services.search.offline.shard_copies import stage_shard
from services.search.shards.local import LocalShard
from services.search.shards.snapshot import Snapshots
from tests.contract.shard_contract import (
    TINY,
    a_collection,
    early_folds,
    found,
    gone,
    lexical,
    put,
    shard_threads,
    unit,
)

FIRST = [put(seq, f"d{seq}", f"apple word{seq}", vector=unit(1, seq), n=seq) for seq in range(1, 41)]
LATER = [put(41, "d3", "pear"), gone(42, "d4"), put(43, "e", "plum")]


@pytest.fixture(scope="module")
def threads():
    """Return the threads that the shards of this file work in."""
    with shard_threads() as made, early_folds():
        yield made


def open_shard(directory, threads):
    """Open the shard in a directory."""
    return LocalShard.open(a_collection(), 0, directory, threads=threads, vectors=TINY)


async def moving_shard(directory, threads):
    """Return a shard with a snapshot at 40, of segments and folded words, whose store is at 43."""
    shard = open_shard(directory, threads)
    await shard.apply(FIRST, 40)
    while await shard.maintain(idle=True):
        pass
    assert await shard.snapshot("e1") == 40
    await shard.apply(LATER, 43)
    return shard


async def test_a_copy_opens_as_the_snapshot_and_takes_what_came_later(threads, tmp_path):
    """Taken while the shard has moved on; the ledger's operations after it make it the same shard."""
    shard = await moving_shard(tmp_path / "shard", threads)
    mark = stage_shard(tmp_path / "shard", tmp_path / "copy")
    await shard.aclose()
    assert (mark.seq, mark.documents, mark.shard) == (40, 40, 0)
    copy = open_shard(tmp_path / "copy", threads)
    assert (copy.origin.seq, copy.problems) == (40, [])
    await copy.apply(LATER, 43)
    assert await found(copy, lexical("pear plum")) == ["d3", "e"]
    assert await found(copy, lexical("word3 word4 word5")) == ["d5"]
    assert copy.documents == 40
    assert sorted(await copy.fetch(["d3", "d4", "e", "d40"])) == ["d3", "d40", "e"]
    await copy.aclose()


async def test_a_shard_without_a_good_snapshot_gives_none(threads, tmp_path):
    """No snapshot, a damaged one and a lost store; nothing is left where the copy would have been."""
    shard = open_shard(tmp_path / "empty", threads)
    await shard.apply(FIRST, 40)
    assert stage_shard(tmp_path / "empty", tmp_path / "copy") is None
    await shard.aclose()
    for file in ("vectors/*.f32", "snapshots/*/ids.bin", "snapshots/*/lexical/*", "store.sqlite"):
        source = tmp_path / file.partition("/")[0] / "shard"
        await (await moving_shard(source, threads)).aclose()
        path = sorted(source.glob(file))[0]
        path.write_bytes(path.read_bytes()[:-1] if "store" not in file else b"")
        assert stage_shard(source, tmp_path / "copy") is None
        assert not (tmp_path / "copy").exists()


async def test_a_snapshot_that_vanishes_is_replaced_by_the_next(threads, tmp_path, monkeypatch):
    """The service removes old snapshots: the copy begins again with those that are there then."""
    shard = await moving_shard(tmp_path / "shard", threads)
    await shard.snapshot("e1")
    names, listed = Snapshots.names, []

    def outdated_at_first(self):
        listed.append(names(self) if listed else ["00000000"])
        return listed[-1]

    monkeypatch.setattr(Snapshots, "names", outdated_at_first)
    mark = stage_shard(tmp_path / "shard", tmp_path / "copy")
    await shard.aclose()
    assert listed[0] == ["00000000"]
    assert mark.seq == 43
