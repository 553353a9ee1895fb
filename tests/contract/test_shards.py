"""The shards that ship, each under the one contract, and what is a shard's own."""

import numpy as np
import pytest
import pytest_asyncio

from services.common.errors import BackendFailed
from services.search.ports import ShardQuery
from services.search.shards.local import LocalShard, search_threads
from tests.contract.shard_contract import DIM, ShardContract, dense, found, lexical, put, unit


class TestLocalShard(ShardContract):
    """The shard in this process."""

    @pytest_asyncio.fixture
    async def make_shard(self, tmp_path):
        """Yield a function that returns a new shard in a directory of its own."""
        readers = search_threads(3)
        shards = []

        async def make():
            shards.append(LocalShard(len(shards), tmp_path / str(len(shards)), DIM, readers=readers))
            return shards[-1]

        yield make
        for shard in shards:
            await shard.aclose()
        readers.shutdown()

    async def test_it_starts_empty_where_another_one_was(self, make_shard, tmp_path):
        """What an earlier process left in the directory is not read: the ledger is applied to it anew."""
        old = await make_shard()
        await old.apply([put(1, "a", "apple")], 1)
        (row,) = [candidate.row for candidate in (await old.search(dense(1))).candidates]
        await old.aclose()
        readers = search_threads(1)
        new = LocalShard(0, tmp_path / "0", DIM, readers=readers)
        assert (new.documents, new.applied_seq) == (0, 0)
        assert await new.fetch([row]) == {}
        await new.apply([put(1, "a", "pear")], 1)
        assert await found(new, lexical("pear")) == ["a"]
        await new.aclose()
        readers.shutdown()

    async def test_a_failed_apply_changes_nothing_and_can_be_repeated(self, shard):
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
        await shard.apply([put(2, "b", "plum")], 2)
        assert await found(shard, lexical("apple")) == ["a"]
        await shard.apply([put(3, "a", "pear"), put(4, "c", "apple")], 4)
        assert await found(shard, lexical("apple")) == ["c"]
        assert await found(shard, lexical("pear")) == ["a"]
        assert await found(shard, dense(1)) == ["a", "b", "c"]

    async def test_a_query_of_another_dimension_is_refused(self, shard):
        """A vector that FAISS would read past its end is an error, not a crash."""
        await shard.apply([put(1, "a", "apple")], 1)
        with pytest.raises(BackendFailed, match="shape"):
            await shard.search(ShardQuery(5, vector=unit(1)[: DIM - 2]))
