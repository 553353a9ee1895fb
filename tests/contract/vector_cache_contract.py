"""What every vector cache must do, as tests: a subclass says how to open one."""

import asyncio
import os
from collections.abc import AsyncIterator

import numpy as np
import pytest

from services.embedding.ports import CachedVector, VectorCache
from services.embedding.vector_keys import KEY_BYTES


def make_entry(seed: int = 0, *, dim: int = 8, tokens: int = 5, truncated: bool = False) -> CachedVector:
    """Return an entry whose numbers follow from *seed*."""
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return CachedVector(vector, tokens, truncated)


def same(one: CachedVector | None, other: CachedVector | None) -> bool:
    """Whether both are the same to the bit."""
    if one is None or other is None:
        return one is other
    numbers = np.array_equal(one.vector, other.vector) and one.vector.dtype == other.vector.dtype == np.float32
    return numbers and (one.tokens, one.truncated) == (other.tokens, other.truncated)


def new_key() -> bytes:
    """Return a key that no other test uses."""
    return os.urandom(KEY_BYTES)


class VectorCacheContract:
    """Inherit this, and give `open`."""

    async def open(self, *, ttl_s: float) -> VectorCache:
        """Return a cache whose entries live *ttl_s*."""
        raise NotImplementedError

    @pytest.fixture
    async def cache(self) -> AsyncIterator[VectorCache]:
        """A cache, closed at the end."""
        cache = await self.open(ttl_s=60.0)
        yield cache
        await cache.aclose()

    async def test_nothing_is_there_at_first(self, cache: VectorCache) -> None:
        """Keys that were never put are misses, one each."""
        assert await cache.get_many([new_key(), new_key()]) == [None, None]

    @pytest.mark.parametrize("dim", [1, 384, 4096])
    async def test_what_is_put_comes_back(self, cache: VectorCache, dim: int) -> None:
        """A vector comes back to the bit, with its tokens and whether its text was cut, as often as it is asked for."""
        key, entry = new_key(), make_entry(dim=dim, tokens=2**31, truncated=True)
        await cache.put_many({key: entry})
        for _ in range(2):
            (found,) = await cache.get_many([key])
            assert same(found, entry)

    async def test_answers_keep_the_order_of_the_keys(self, cache: VectorCache) -> None:
        """One answer a key, in order, None where there is none, the same key twice if it was asked twice."""
        keys = [new_key() for _ in range(5)]
        entries = {key: make_entry(number) for number, key in enumerate(keys) if number % 2}
        await cache.put_many(entries)
        asked = [*keys, keys[1], new_key()]
        found = await cache.get_many(asked)
        assert len(found) == len(asked)
        assert all(same(one, entries.get(key)) for key, one in zip(asked, found, strict=True))

    async def test_the_last_one_put_counts(self, cache: VectorCache) -> None:
        """A second entry under a key replaces the first."""
        key = new_key()
        await cache.put_many({key: make_entry(1)})
        await cache.put_many({key: make_entry(2)})
        (found,) = await cache.get_many([key])
        assert same(found, make_entry(2))

    async def test_rows_of_a_batch_are_kept_alone(self, cache: VectorCache) -> None:
        """A row of a larger array is kept as it was, whatever becomes of the array."""
        key, batch = new_key(), np.ones((4, 8), dtype=np.float32)
        await cache.put_many({key: CachedVector(batch[1], 3, False)})
        batch[:] = 7
        (found,) = await cache.get_many([key])
        assert found is not None
        assert found.vector.tolist() == [1.0] * 8

    async def test_nothing_asked_and_nothing_put(self, cache: VectorCache) -> None:
        """No keys give no answers, and no entries are no error."""
        await cache.put_many({})
        assert await cache.get_many([]) == []

    async def test_entries_die(self) -> None:
        """After its time to live an entry is a miss."""
        cache = await self.open(ttl_s=0.05)
        key = new_key()
        try:
            await cache.put_many({key: make_entry()})
            async with asyncio.timeout(10):
                while (await cache.get_many([key]))[0] is not None:
                    await asyncio.sleep(0.01)
        finally:
            await cache.aclose()

    async def test_concurrent_use(self, cache: VectorCache) -> None:
        """Many callers at once each get what was put under their keys."""
        groups = [{new_key(): make_entry(10 * group + number) for number in range(10)} for group in range(20)]
        await asyncio.gather(*(cache.put_many(group) for group in groups))
        found = await asyncio.gather(*(cache.get_many(list(group)) for group in groups))
        for group, answers in zip(groups, found, strict=True):
            assert all(same(one, other) for one, other in zip(group.values(), answers, strict=True))
