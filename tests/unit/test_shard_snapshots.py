"""Snapshots of a shard: what is loaded, what damage costs, and what a crash in the midst of one leaves."""

import asyncio
import shutil
from dataclasses import replace

import numpy as np
import pytest

from services.common.errors import BackendFailed, Conflict
from services.search.shards import files
from services.search.shards.local import LocalShard
from tests.contract.shard_contract import (
    TINY,
    a_collection,
    dense,
    early_folds,
    found,
    gone,
    lexical,
    put,
    shard_threads,
    unit,
)

FIRST = [put(seq, f"d{seq}", f"apple word{seq}", vector=unit(1, seq), title="t", n=seq) for seq in range(1, 31)]
SECOND = [put(31, "d3", "pear", vector=unit(0, 1), n=31), gone(32, "d4"), put(33, "e", "plum", vector=unit(2, 1), n=33)]
THIRD = [put(34, "d5", "kiwi", vector=unit(0, 3), n=34), gone(35, "e"), put(36, "f", "fig", vector=unit(1, 1), n=36)]


@pytest.fixture(scope="module")
def threads():
    """Return the threads that the shards of this file work in."""
    with shard_threads() as made:
        yield made


@pytest.fixture(autouse=True)
def folds():
    """Fold early, so that snapshots have files of every kind."""
    with early_folds():
        yield


@pytest.fixture
def open_shard(threads):
    """Return a function that opens the shard in a directory."""

    def open_it(directory, collection=None, **options):
        return LocalShard.open(collection or a_collection(), 0, directory, threads=threads, vectors=TINY, **options)

    return open_it


def replayed(after):
    """Return the newest operation of each document, as a ledger has them, numbered above *after*."""
    newest = {operation.id: operation for operation in [*FIRST, *SECOND, *THIRD]}
    return [operation for operation in newest.values() if operation.seq > after]


async def check_all(shard):
    """Assert that *shard*, once the ledger is replayed, has every document and no other, in every index."""
    await shard.apply(replayed(shard.applied_seq), 36)
    expected = sorted({*(f"d{n}" for n in range(1, 31)), "f"} - {"d4"})
    assert shard.documents == len(expected)
    assert await found(shard, dense(1, limit=100)) == expected
    assert await found(shard, lexical("apple kiwi fig pear plum", limit=100)) == expected
    assert await found(shard, lexical("word7")) == ["d7"]
    assert await found(shard, lexical("kiwi")) == ["d5"]
    assert await found(shard, dense(1, limit=100, filter={"n": {"$gte": 31}})) == ["d3", "d5", "f"]
    documents = await shard.fetch(expected, vectors=True)
    assert sorted(documents) == expected
    for operation in replayed(0):
        if operation.document is not None:
            np.testing.assert_array_equal(documents[operation.id].vector, operation.document.vector)


async def two_snapshots(open_it, directory):
    """Leave two snapshots in *directory*, at operations 30 and 33, and a store that is at 36."""
    shard = open_it(directory)
    await shard.apply(FIRST[:20], 20)
    while await shard.maintain(idle=True):
        pass
    await shard.apply(FIRST[20:], 30)
    assert await shard.snapshot("e1") == 30
    await shard.apply(SECOND, 33)
    assert await shard.snapshot("e1") == 33
    await shard.apply(THIRD, 36)
    await shard.aclose()


async def test_a_shard_is_opened_from_its_newest_snapshot(open_shard, tmp_path):
    """It stands where the snapshot was made, whatever came after, and the ledger's tail brings it up to date."""
    await two_snapshots(open_shard, tmp_path)
    shard = open_shard(tmp_path)
    assert (shard.origin.epoch, shard.origin.seq, shard.applied_seq, shard.problems) == ("e1", 33, 33, [])
    assert await found(shard, lexical("plum")) == []  # Its text went with the operation that deleted it.
    assert await found(shard, lexical("pear")) == ["d3"]
    await check_all(shard)
    await shard.aclose()


async def test_opening_twice_without_a_word_in_between_is_the_same(open_shard, tmp_path):
    """A crash while the ledger is replayed costs nothing but the time."""
    await two_snapshots(open_shard, tmp_path)
    for _ in range(2):
        shard = open_shard(tmp_path)
        assert shard.origin.seq == 33
        await shard.apply(replayed(33)[:1], 34)
        await shard.aclose()
    shard = open_shard(tmp_path)
    await check_all(shard)
    await shard.aclose()


async def test_two_snapshots_are_kept(open_shard, tmp_path):
    """Older ones go, with the files that only they needed."""
    shard = open_shard(tmp_path)
    counts = []
    for seq in range(1, 31):
        await shard.apply([FIRST[seq - 1]], seq)
        if seq % 3 == 0:
            while await shard.maintain(idle=True):
                pass
            await shard.snapshot("e")
        counts.append(len(list((tmp_path / "vectors").iterdir())))
    assert len(list((tmp_path / "snapshots").iterdir())) == 2
    assert max(counts) < 20
    await shard.aclose()


async def test_nothing_is_written_where_nothing_moved(open_shard, tmp_path):
    """The present snapshot is returned, also by a shard that was loaded from it."""
    await two_snapshots(open_shard, tmp_path)
    before = sorted((tmp_path / "snapshots").iterdir())
    shard = open_shard(tmp_path)
    assert await shard.snapshot("e2") == 33
    assert await shard.snapshot("e2") == 33
    assert sorted((tmp_path / "snapshots").iterdir()) == before
    await shard.aclose()


async def test_what_maintenance_made_is_worth_a_snapshot(open_shard, tmp_path):
    """Merged segments are a change without an operation: a start from an older snapshot would merge them again."""
    shard = open_shard(tmp_path)
    assert not shard.changed
    await shard.apply(FIRST, 30)
    assert shard.changed
    assert await shard.snapshot("e1") == 30
    assert not shard.changed
    while await shard.maintain(idle=True):
        assert shard.changed
    assert await shard.snapshot("e1") == 30
    assert not shard.changed
    await shard.aclose()
    shard = open_shard(tmp_path)
    assert not shard.changed
    assert not await shard.maintain(idle=True)
    await shard.aclose()


async def test_writes_go_on_while_a_snapshot_is_written(open_shard, tmp_path):
    """What is applied meanwhile is not in the snapshot, which is of one moment."""
    shard = open_shard(tmp_path)
    await shard.apply(FIRST[:10], 10)
    snapshot = asyncio.create_task(shard.snapshot("e"))
    for seq in range(11, 31):
        await shard.apply([FIRST[seq - 1]], seq)
    seq = await snapshot
    await shard.aclose()
    shard = open_shard(tmp_path)
    assert shard.applied_seq == shard.documents == seq
    assert await found(shard, lexical("apple", limit=100)) == sorted(f"d{n}" for n in range(1, seq + 1))
    await shard.aclose()


def damages(path):
    """Yield what may happen to a file, as functions."""
    data = path.read_bytes()
    yield path.unlink
    yield lambda: path.write_bytes(data[: len(data) // 2])
    yield lambda: path.write_bytes(b"")
    for position in (0, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        if flipped:
            flipped[position] ^= 0x10
            yield lambda flipped=flipped: path.write_bytes(flipped)


def private_copy(source, target):
    """Copy a shard's directory; hard links become files of their own."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


async def test_any_damage_to_the_newest_snapshot_costs_only_time(open_shard, tmp_path):
    """Each of its files, gone, cut off or altered by one bit: the older one is used, or none, and a replay mends all."""
    await two_snapshots(open_shard, tmp_path / "good")
    newest = max((tmp_path / "good" / "snapshots").iterdir())
    paths = [path.relative_to(tmp_path / "good") for path in newest.rglob("*") if path.is_file()]
    assert len(paths) > 4
    for path in paths:
        for number in range(6):
            private_copy(tmp_path / "good", tmp_path / "bad")
            kinds = list(damages(tmp_path / "bad" / path))
            if number >= len(kinds):
                break
            kinds[number]()
            shard = open_shard(tmp_path / "bad")
            if (tmp_path / "good" / path).stat().st_size:
                assert shard.applied_seq in (0, 30)
                assert shard.problems
                assert newest.name not in [p.name for p in (tmp_path / "bad" / "snapshots").glob("*")]
            await check_all(shard)
            await shard.aclose()


async def test_damage_to_what_both_snapshots_need_is_found(open_shard, tmp_path):
    """The vectors' files, the store and CURRENT: the shard opens all the same, and a replay mends all."""
    await two_snapshots(open_shard, tmp_path / "good")
    names = [path.relative_to(tmp_path / "good") for path in (tmp_path / "good" / "vectors").iterdir()]
    for path in [*names, "CURRENT", "store.sqlite"]:
        for number in range(4):
            private_copy(tmp_path / "good", tmp_path / "bad")
            list(damages(tmp_path / "bad" / path))[number]()
            shard = open_shard(tmp_path / "bad")
            assert shard.origin is not None or shard.problems
            if path != "store.sqlite" or shard.origin is None:
                await check_all(shard)
            await shard.aclose()


async def test_a_store_that_is_older_than_the_snapshot_is_not_used(open_shard, tmp_path):
    """A store put back from a backup, or of another shard, would lack documents: the shard begins empty."""
    shard = open_shard(tmp_path)
    await shard.apply(FIRST[:10], 10)
    await shard.snapshot("e")
    await shard.aclose()
    shutil.copytree(tmp_path, tmp_path.with_name("old"))
    shard = open_shard(tmp_path)
    await shard.apply(FIRST[10:], 30)
    await shard.snapshot("e")
    await shard.aclose()
    for name in ("store.sqlite", "store.sqlite-wal", "store.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
        if (tmp_path.with_name("old") / name).exists():
            shutil.copy(tmp_path.with_name("old") / name, tmp_path / name)
    shard = open_shard(tmp_path)
    assert shard.applied_seq in (0, 10)
    assert "older" in shard.problems[0]
    await check_all(shard)
    await shard.aclose()


async def test_a_snapshot_of_another_shard_is_not_used(open_shard, tmp_path):
    """One of another collection, dimension or metric is as good as damaged."""
    await two_snapshots(open_shard, tmp_path / "good")
    for change in ({"uuid": "u2"}, {"dim": 9}, {"metric": "l2"}):
        private_copy(tmp_path / "good", tmp_path / "bad")
        shard = open_shard(tmp_path / "bad", a_collection(**change))
        assert (shard.origin, shard.documents, len(shard.problems)) == (None, 0, 2)
        await shard.aclose()


async def test_another_number_of_shards_is_refused(open_shard, tmp_path):
    """The error says how to get what was wanted, and nothing is touched."""
    await two_snapshots(open_shard, tmp_path)
    with pytest.raises(Conflict, match="reindex into a new collection"):
        open_shard(tmp_path, replace(a_collection(), shards=8))
    shard = open_shard(tmp_path)
    assert shard.origin.seq == 33
    await shard.aclose()


class Failing(files.Disk):
    """A disk on which every step from the n-th on fails, as if the process were gone."""

    def __init__(self, steps):
        self.steps = steps
        self.failed = False

    def step(self):
        self.failed = self.failed or self.steps == 0
        self.steps -= 1
        if self.failed:
            raise OSError("the disk is gone")

    def write(self, path, data):
        if self.steps == 0:
            path.write_bytes(data[: len(data) // 2])
        self.step()
        super().write(path, data)

    def sync(self, path):
        self.step()
        super().sync(path)

    def rename(self, source, target):
        self.step()
        super().rename(source, target)

    def link(self, source, target):
        self.step()
        super().link(source, target)

    def remove(self, path):
        self.step()
        super().remove(path)


class Forgetful(Failing):
    """A disk that loses power at the n-th step: contents and names that were not synced by then are torn or gone."""

    def __init__(self, steps):
        super().__init__(steps)
        self.torn = set()
        self.nameless = set()
        self.renamed = []

    def step(self):
        if self.steps == 0:
            for path in self.torn:
                path.write_bytes(path.read_bytes()[:-1])
            for path in self.nameless:
                path.unlink()
            for source, target, before in reversed(self.renamed):
                if target.exists():
                    target.rename(source)
                if before is not None:
                    target.write_bytes(before)
        super().step()

    def write(self, path, data):
        if not path.exists():
            self.nameless.add(path)
        super().write(path, data)
        self.torn.add(path)

    def sync(self, path):
        super().sync(path)
        self.torn.discard(path)
        self.nameless = {name for name in self.nameless if name.parent != path}
        self.renamed = [renamed for renamed in self.renamed if renamed[1].parent != path]

    def rename(self, source, target):
        before = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self.renamed.append((source, target, before))
        for paths in (self.torn, self.nameless):
            moved = {path for path in paths if path.is_relative_to(source)}
            paths -= moved
            paths |= {target / path.relative_to(source) if path != source else target for path in moved}

    def remove(self, path):
        super().remove(path)
        self.torn.discard(path)
        self.nameless.discard(path)


@pytest.mark.parametrize("kind", [Failing, Forgetful])
async def test_a_crash_at_any_step_of_a_snapshot_costs_only_time(open_shard, tmp_path, kind):
    """Whichever step is the last that happens, the shard opens without complaint from the new snapshot or an old one."""
    await two_snapshots(open_shard, tmp_path / "good")
    steps = 0
    while True:
        private_copy(tmp_path / "good", tmp_path / "crashed")
        shard = open_shard(tmp_path / "crashed")
        await shard.apply(replayed(33), 36)
        disk = kind(steps)
        with files.replaced_by(disk):
            try:
                await shard.snapshot("e2")
            except BackendFailed:
                assert disk.failed
        await shard.aclose()
        shard = open_shard(tmp_path / "crashed")
        assert shard.origin is not None
        assert shard.origin.seq in ((33, 36) if disk.failed else (36,))
        assert shard.problems == []
        await check_all(shard)
        assert await shard.snapshot("e3") == 36
        await shard.aclose()
        if not disk.failed:
            break
        steps += 1
    assert steps > 10


async def test_after_a_failed_snapshot_the_shard_goes_on(open_shard, tmp_path):
    """A full disk fails the snapshot alone: searches, writes and the next snapshot work."""
    shard = open_shard(tmp_path)
    await shard.apply(FIRST, 30)
    with files.replaced_by(Failing(1)), pytest.raises(BackendFailed, match="disk is gone"):
        await shard.snapshot("e")
    assert await found(shard, lexical("word7")) == ["d7"]
    await shard.apply(SECOND, 33)
    assert await shard.snapshot("e") == 33
    await check_all(shard)
    await shard.aclose()
