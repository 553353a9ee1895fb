"""The shards that ship, each under the one contract, and what is a shard's own."""

import asyncio

import numpy as np
import pytest
import pytest_asyncio

from services.common.errors import BackendFailed, Conflict, NotReady
from services.search.ports import ShardQuery
from services.search.shards.local import LocalShard
from services.search.shards.vectors import VectorOptions
from tests.contract.shard_contract import (
    DIM,
    TINY,
    ShardContract,
    a_collection,
    dense,
    early_folds,
    found,
    lexical,
    put,
    shard_threads,
    unit,
)


@pytest.fixture(scope="module")
def threads():
    """Return the threads that the shards of this file work in."""
    with shard_threads() as made:
        yield made


class Kept:
    """A shard that after every apply does all maintenance or is opened again from a snapshot, as the test wishes."""

    def __init__(self, open, maintained, reopened):
        self._open = open
        self._maintained = maintained
        self._reopened = reopened
        self._closed = False
        self._shard = open()

    number = property(lambda self: self._shard.number)
    applied_seq = property(lambda self: self._shard.applied_seq)
    documents = property(lambda self: self._shard.documents)

    async def apply(self, operations, applied_seq):
        await self._shard.apply(operations, applied_seq)
        while self._maintained and await self._shard.maintain(idle=True):
            pass
        if self._reopened:
            await self._shard.snapshot("epoch")
            await self._shard.aclose()
            self._shard = self._open()
            assert self._shard.origin is not None
            assert self._shard.problems == []

    async def _ask(self, question):
        while True:
            shard = self._shard
            try:
                return await question(shard)
            except NotReady:
                if self._closed or not self._reopened:
                    raise
                while self._shard is shard:
                    await asyncio.sleep(0.001)

    async def search(self, query):
        return await self._ask(lambda shard: shard.search(query))

    async def statistics(self, terms):
        return await self._ask(lambda shard: shard.statistics(terms))

    async def fetch(self, ids, *, vectors=False):
        return await self._ask(lambda shard: shard.fetch(ids, vectors=vectors))

    async def matching(self, filter, *, limit):
        return await self._ask(lambda shard: shard.matching(filter, limit=limit))

    async def aclose(self):
        self._closed = True
        await self._shard.aclose()


class LocalShardContract(ShardContract):
    """A shard in this process; subclasses say how it is kept."""

    options = VectorOptions()
    maintained = False
    reopened = False

    @pytest_asyncio.fixture
    async def make_shard(self, tmp_path, threads):
        """Yield a function that returns a new shard in a directory of its own."""
        shards = []

        async def make():
            number = len(shards)

            def open_it():
                return LocalShard.open(
                    a_collection(), number, tmp_path / str(number), threads=threads, vectors=self.options
                )

            plain = not (self.maintained or self.reopened)
            shards.append(open_it() if plain else Kept(open_it, self.maintained, self.reopened))
            return shards[-1]

        yield make
        for shard in shards:
            await shard.aclose()


class TestLocalShard(LocalShardContract):
    """As it comes."""


class TestMaintainedShard(LocalShardContract):
    """With segments so small that every few documents are sealed, merged and folded."""

    options = TINY
    maintained = True

    @pytest.fixture(autouse=True)
    def folds(self):
        """Fold early."""
        with early_folds():
            yield


class TestReopenedShard(LocalShardContract):
    """Opened again from a snapshot after every apply."""

    options = TINY
    reopened = True


@pytest_asyncio.fixture
async def shard(tmp_path, threads):
    """Return an empty shard."""
    shard = LocalShard.open(a_collection(), 0, tmp_path / "0", threads=threads, vectors=TINY)
    yield shard
    await shard.aclose()


async def test_without_snapshots_it_starts_empty(tmp_path, threads):
    """What an earlier process left in the directory is removed when its owner distrusts it, and never comes back."""
    place = {"threads": threads, "vectors": TINY}
    old = LocalShard.open(a_collection(), 0, tmp_path, **place)
    await old.apply([put(1, "a", "apple")], 1)
    await old.snapshot("e")
    await old.aclose()
    for use_snapshots in (False, True):
        new = LocalShard.open(a_collection(), 0, tmp_path, **place, use_snapshots=use_snapshots)
        assert (new.documents, new.applied_seq, new.origin) == (0, 0, None)
        assert await new.fetch(["a"]) == {}
        await new.apply([put(1, "a", "pear")], 1)
        assert await found(new, lexical("pear")) == ["a"]
        assert await found(new, lexical("apple")) == []
        await new.aclose()


async def test_a_failed_apply_changes_nothing_and_can_be_repeated(shard):
    """A document that an index refuses fails its whole call; searches go on as before, and so do later writes."""
    await shard.apply([put(1, "a", "apple")], 1)
    bad_vector = put(3, "c", "apple", vector=np.ones(DIM + 1, np.float32))
    bad_text = put(3, "c", None)
    bad_metadata = put(3, "c", "apple", x=2**70)
    for bad in (bad_vector, bad_text, bad_metadata):
        with pytest.raises(BackendFailed):
            await shard.apply([put(2, "a", "pear"), bad], 3)
        assert await found(shard, lexical("apple pear")) == ["a"]
        assert await found(shard, lexical("pear")) == []
        assert (shard.documents, shard.applied_seq) == (1, 1)
        assert (await shard.fetch(["a", "c"]))["a"].text == "apple"
    await shard.apply([put(2, "b", "plum")], 2)
    assert await found(shard, lexical("apple")) == ["a"]
    await shard.apply([put(3, "a", "pear"), put(4, "c", "apple")], 4)
    assert await found(shard, lexical("apple")) == ["c"]
    assert await found(shard, lexical("pear")) == ["a"]
    assert await found(shard, dense(1)) == ["a", "b", "c"]
    await shard.snapshot("e")


async def test_a_query_of_another_dimension_is_refused(shard):
    """A vector that FAISS would read past its end is an error, not a crash."""
    await shard.apply([put(1, "a", "apple")], 1)
    with pytest.raises(BackendFailed, match=r"shape|dimension"):
        await shard.search(ShardQuery(5, vector=unit(1)[: DIM - 2]))


async def test_a_second_one_in_the_same_directory_is_refused(shard, tmp_path, threads):
    """Two that write the same files would ruin them; the error says who has it."""
    with pytest.raises(Conflict, match="in use by process"):
        LocalShard.open(a_collection(), 0, tmp_path / "0", threads=threads, vectors=TINY)


async def test_it_says_how_it_stands(shard):
    """Documents, rows, disk and the snapshot are told."""
    await shard.apply([put(1, "a", "apple"), put(2, "b", "pear")], 2)
    await shard.apply([put(3, "a", "plum")], 3)
    standing = shard.standing()
    assert (standing.shard, standing.applied_seq, standing.documents, standing.rows) == (0, 3, 2, 3)
    assert (standing.snapshot_seq, sum(standing.segments.values())) == (0, 3)
    assert standing.disk_bytes > 0
    assert await shard.snapshot("e") == 3
    assert shard.standing().snapshot_seq == 3
