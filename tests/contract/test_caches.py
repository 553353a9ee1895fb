"""The result caches that ship, each held to the contract, and what becomes of one whose Redis goes away."""

import asyncio
import os
import time

import pytest
import redis

from services.common.breaker import Breaker
from services.common.key_value import KeyValueStore
from services.search.cache import KEY_PREFIX, MemoryResultCache, RedisResultCache
from services.search.ports import CacheEntry, ResultCache
from tests.contract.cache_contract import ResultCacheContract, key, make_entry
from tests.redis_server import PATIENCE_S, RedisServer

__all__ = ["key"]  # A fixture, found by its name in this module.


@pytest.fixture
def breaker() -> Breaker:
    """A breaker that tries again soon."""
    return Breaker("redis", min_calls=3, reset_s=0.02)


class TestMemoryResultCache(ResultCacheContract):
    """The cache in this process."""

    async def open(self, *, ttl_s: float) -> ResultCache:
        return MemoryResultCache(max_bytes=1 << 20, ttl_s=ttl_s)

    async def test_the_least_recently_used_goes_first(self) -> None:
        """At its bound the cache drops what was not asked for longest."""
        cache = MemoryResultCache(max_bytes=4_000, ttl_s=60)
        for name in "abc":
            await cache.put(name, make_entry(b"x" * 1_000))
        assert await cache.get("a") is not None
        await cache.put("d", make_entry(b"x" * 1_000))
        kept = [name for name in "abcd" if await cache.get(name) is not None]
        assert kept == ["a", "c", "d"]

    async def test_the_bound_holds_after_replacing(self) -> None:
        """Putting a key again does not count its old entry any more."""
        cache = MemoryResultCache(max_bytes=4_000, ttl_s=60)
        await cache.put("a", make_entry(b"x" * 1_000))
        for _ in range(20):
            await cache.put("b", make_entry(b"x" * 1_000))
        assert await cache.get("a") is not None

    async def test_an_entry_over_the_bound_is_not_kept(self) -> None:
        """One answer never throws out all others; with a bound of 0 nothing is kept."""
        cache = MemoryResultCache(max_bytes=4_000, ttl_s=60)
        await cache.put("a", make_entry())
        await cache.put("b", make_entry(b"x" * 10_000))
        assert await cache.get("b") is None
        assert await cache.get("a") is not None
        nothing = MemoryResultCache(max_bytes=0, ttl_s=60)
        await nothing.put("a", make_entry(b""))
        assert await nothing.get("a") is None

    async def test_the_time_to_live_counts_from_when_the_answer_was_made(self) -> None:
        """An old answer does not live longer for being put late."""
        cache = MemoryResultCache(max_bytes=4_000, ttl_s=60)
        await cache.put("a", CacheEntry(1, time.time() - 61, b"{}"))
        assert await cache.get("a") is None


class RedisContract(ResultCacheContract):
    """What a cache in Redis does besides."""

    url: str

    async def open(self, *, ttl_s: float) -> ResultCache:
        return RedisResultCache(KeyValueStore(self.url, Breaker("redis")), ttl_s=ttl_s)

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"garbage",
            b"\n",
            b"[1]\n{}",
            b"{}\n{}",
            b'["x", 1]\n{}',
            b"[null, null]\n{}",
            b"[1, 2, 3]\n{}",
            b"5\n{}",
            b"\xff\n{}",
            b"[1e999, 0]\n{}",
        ],
    )
    async def test_what_is_no_entry_is_a_miss(self, cache: ResultCache, key: str, value: bytes) -> None:
        """Whatever somebody else wrote under our key is a miss, and is replaced by the next answer."""
        with redis.Redis.from_url(self.url) as client:
            client.set(KEY_PREFIX + key, value)
        assert await cache.get(key) is None
        entry = make_entry()
        await cache.put(key, entry)
        assert await cache.get(key) == entry

    async def test_another_type_under_our_key_is_a_miss(self, cache: ResultCache, key: str) -> None:
        """A list or a hash under our key is a miss as often as it is asked for, and no sign that Redis is unwell."""
        with redis.Redis.from_url(self.url) as client:
            client.rpush(KEY_PREFIX + key, "a", "b")
        for _ in range(5):
            assert await cache.get(key) is None
        assert cache.available
        other = make_entry()
        await cache.put(key + "-other", other)
        assert await cache.get(key + "-other") == other

    async def test_entries_expire_in_redis_itself(self, cache: ResultCache, key: str) -> None:
        """Every key has a time to live, so that a Redis without eviction does not fill up."""
        await cache.put(key, make_entry())
        with redis.Redis.from_url(self.url) as client:
            assert 0 < client.pttl(KEY_PREFIX + key) <= 60_000


class TestRedisResultCache(RedisContract):
    """The cache in a Redis that the tests start, and may kill."""

    @pytest.fixture(autouse=True)
    def _url(self, redis_server: RedisServer) -> None:
        self.url = redis_server.url

    async def test_two_processes_share_one(self, cache: ResultCache, key: str) -> None:
        """What one search process put is a hit for the other."""
        other = await self.open(ttl_s=60.0)
        entry = make_entry()
        await cache.put(key, entry)
        assert await other.get(key) == entry
        await other.aclose()

    async def test_losing_redis_is_a_miss_until_it_is_back(
        self, redis_server: RedisServer, breaker: Breaker, key: str
    ) -> None:
        """Killed in the middle, Redis gives misses and no error; the breaker stops asking; started again, it is used again."""
        cache = RedisResultCache(KeyValueStore(redis_server.url, breaker), ttl_s=60.0)
        entry = make_entry()
        await cache.put(key, entry)
        assert await cache.get(key) == entry
        redis_server.kill()
        try:
            for _ in range(5):
                assert await cache.get(key) is None
                await cache.put(key, entry)
            assert not cache.available
        finally:
            redis_server.start()
        async with asyncio.timeout(PATIENCE_S):
            while await cache.get(key) is None:
                await asyncio.sleep(0.01)
                await cache.put(key, entry)
        assert cache.available
        assert await cache.get(key) == entry
        await cache.aclose()

    async def test_a_redis_that_does_not_answer_is_a_miss_soon(self, breaker: Breaker, key: str) -> None:
        """A server that accepts and says nothing costs a bounded time, and after a few tries none."""
        held = []

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held.append(writer)
            await reader.read()
            writer.close()

        async with await asyncio.start_server(hold, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            cache = RedisResultCache(KeyValueStore(f"redis://127.0.0.1:{port}/0", breaker), ttl_s=60.0)
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(3):
                    assert await cache.get(key) is None
            assert not cache.available
            await cache.aclose()
            for writer in held:
                writer.close()


@pytest.mark.skipif("TERCET_TEST_REDIS_URL" not in os.environ, reason="TERCET_TEST_REDIS_URL names no Redis")
class TestGivenRedis(RedisContract):
    """The cache in the Redis that TERCET_TEST_REDIS_URL names."""

    url = os.environ.get("TERCET_TEST_REDIS_URL", "")
