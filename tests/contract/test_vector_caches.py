"""The vector caches that ship, each held to the contract, and what becomes of one whose Redis goes away."""

import asyncio
import pickle

import numpy as np
import pytest
import redis

from services.common.breaker import Breaker
from services.common.key_value import KeyValueStore
from services.embedding.app import VECTORS_TIMEOUT_S
from services.embedding.cache import (
    ENTRY_OVERHEAD_BYTES,
    KEY_PREFIX,
    MemoryVectorCache,
    RedisVectorCache,
    pack,
    unpack,
)
from services.embedding.ports import CachedVector, VectorCache
from tests.contract.vector_cache_contract import VectorCacheContract, make_entry, new_key, same
from tests.redis_server import PATIENCE_S, RedisServer

ENTRY_BYTES = 8 * 4 + ENTRY_OVERHEAD_BYTES  # What make_entry's eight numbers count for.


class TestMemoryVectorCache(VectorCacheContract):
    """The cache in this process."""

    async def open(self, *, ttl_s: float) -> VectorCache:
        return MemoryVectorCache(max_bytes=1 << 24, ttl_s=ttl_s)

    async def test_the_least_recently_used_goes_first(self) -> None:
        """At its bound the cache drops what was not asked for longest."""
        cache = MemoryVectorCache(max_bytes=3 * ENTRY_BYTES, ttl_s=60)
        keys = [new_key() for _ in range(4)]
        for key in keys[:3]:
            await cache.put_many({key: make_entry()})
        await cache.get_many([keys[0]])
        await cache.put_many({keys[3]: make_entry()})
        assert [found is not None for found in await cache.get_many(keys)] == [True, False, True, True]

    async def test_replacing_counts_once(self) -> None:
        """Putting a key again does not count its old entry any more."""
        cache = MemoryVectorCache(max_bytes=2 * ENTRY_BYTES, ttl_s=60)
        kept, again = new_key(), new_key()
        await cache.put_many({kept: make_entry()})
        for _ in range(20):
            await cache.put_many({again: make_entry()})
        assert None not in await cache.get_many([kept, again])

    async def test_an_entry_over_the_bound_is_not_kept(self) -> None:
        """One vector never throws out all others."""
        cache = MemoryVectorCache(max_bytes=2 * ENTRY_BYTES, ttl_s=60)
        small, large = new_key(), new_key()
        await cache.put_many({small: make_entry()})
        await cache.put_many({large: make_entry(dim=4096)})
        assert [found is not None for found in await cache.get_many([small, large])] == [True, False]


class TestRedisVectorCache(VectorCacheContract):
    """The cache in a Redis that the tests start, and may kill."""

    @pytest.fixture(autouse=True)
    def _url(self, redis_server: RedisServer) -> None:
        self.url = redis_server.url

    async def open(self, *, ttl_s: float) -> VectorCache:
        return RedisVectorCache(KeyValueStore(self.url, Breaker("redis"), timeout_s=VECTORS_TIMEOUT_S), ttl_s=ttl_s)

    def commands(self) -> dict[str, int]:
        """Return how often each command was called so far."""
        with redis.Redis.from_url(self.url) as client:
            stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): int(figures["calls"]) for name, figures in stats.items()}

    async def test_a_batch_is_one_question(self, cache: VectorCache) -> None:
        """However many keys, they are asked for by one MGET."""
        before = self.commands().get("mget", 0)
        await cache.get_many([new_key() for _ in range(100)])
        assert self.commands()["mget"] - before == 1

    async def test_entries_expire_in_redis_itself(self, cache: VectorCache) -> None:
        """Every key has a time to live, so that a Redis without eviction does not fill up."""
        keys = [new_key() for _ in range(3)]
        await cache.put_many({key: make_entry() for key in keys})
        with redis.Redis.from_url(self.url) as client:
            assert all(0 < client.pttl(KEY_PREFIX + key) <= 60_000 for key in keys)

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"garbage",
            pack(make_entry())[:-1],
            pack(make_entry()) + b"\0",
            pack(make_entry())[:16],
            b"XXXX" + pack(make_entry())[4:],
            pack(CachedVector(np.array([1, np.nan], dtype=np.float32), 1, False)),
            pickle.dumps([1.0, 2.0]),
        ],
        ids=["empty", "garbage", "cut short", "too long", "header alone", "another version", "no number", "a pickle"],
    )
    async def test_a_damaged_value_is_a_miss(self, cache: VectorCache, value: bytes) -> None:
        """Whatever somebody else wrote under our key is a miss, and is replaced by the next vector."""
        key, sound = new_key(), new_key()
        await cache.put_many({sound: make_entry(3)})
        with redis.Redis.from_url(self.url) as client:
            client.set(KEY_PREFIX + key, value)
        found = await cache.get_many([key, sound])
        assert found[0] is None
        assert same(found[1], make_entry(3))
        await cache.put_many({key: make_entry(4)})
        assert same((await cache.get_many([key]))[0], make_entry(4))

    async def test_another_type_under_our_key_is_a_miss(self, cache: VectorCache) -> None:
        """A list under our key is a miss, and no sign that Redis is unwell."""
        key, sound = new_key(), new_key()
        await cache.put_many({sound: make_entry()})
        with redis.Redis.from_url(self.url) as client:
            client.rpush(KEY_PREFIX + key, "a")
        found = await cache.get_many([key, sound])
        assert found[0] is None
        assert found[1] is not None

    async def test_two_processes_share_one(self, cache: VectorCache) -> None:
        """What one process put is a hit for the other."""
        key, other = new_key(), await self.open(ttl_s=60.0)
        await cache.put_many({key: make_entry()})
        assert same((await other.get_many([key]))[0], make_entry())
        await other.aclose()

    async def test_losing_redis_is_a_miss_until_it_is_back(self, redis_server: RedisServer) -> None:
        """Killed in the middle, Redis gives misses and no error; started again, it is used again."""
        cache = RedisVectorCache(
            KeyValueStore(redis_server.url, Breaker("redis", min_calls=3, reset_s=0.02)), ttl_s=60.0
        )
        key = new_key()
        await cache.put_many({key: make_entry()})
        redis_server.kill()
        try:
            for _ in range(5):
                assert await cache.get_many([key, new_key()]) == [None, None]
                await cache.put_many({key: make_entry()})
        finally:
            redis_server.start()
        async with asyncio.timeout(PATIENCE_S):
            while (await cache.get_many([key]))[0] is None:
                await asyncio.sleep(0.01)
                await cache.put_many({key: make_entry()})
        await cache.aclose()


def test_the_stored_form() -> None:
    """A value is a header of sixteen bytes and the numbers as little-endian float32."""
    raw = pack(CachedVector(np.array([1.5, -2.0], dtype=np.float32), 7, True))
    assert (
        raw
        == b"TVC1"
        + b"\x01\0\0\0"
        + (7).to_bytes(4, "little")
        + (2).to_bytes(4, "little")
        + np.array([1.5, -2.0], dtype="<f4").tobytes()
    )
    found = unpack(raw)
    assert found is not None
    assert (found.vector.tolist(), found.tokens, found.truncated) == ([1.5, -2.0], 7, True)
