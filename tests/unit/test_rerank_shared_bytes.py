"""Bytes that processes share through Redis: written in the background, and missed without a word."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import redis

from services.common.app import make_store
from services.common.metrics import Metrics
from services.rerank.settings import RerankSettings
from services.rerank.shared_bytes import MAX_WAITING_BYTES, RedisBytes
from tests.batching_engine import until
from tests.redis_server import RedisServer

Open = Callable[..., RedisBytes]


@pytest.fixture
async def start(redis_server: RedisServer) -> AsyncIterator[Open]:
    """Open stores of bytes in an empty Redis, closed at the end."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    opened = []

    def start(prefix: bytes = b"test:", url: str = redis_server.url) -> RedisBytes:
        store = make_store("redis", url, RerankSettings(model="fake"), Metrics("test"), timeout_s=1.0)
        opened.append((store, RedisBytes(store, prefix, ttl_s=60)))
        return opened[-1][1]

    yield start
    for store, shared in opened:
        await shared.aclose()
        await store.aclose()


async def test_what_one_writes_another_reads(start, redis_server):
    """In the order asked; under the prefix, with an end; each kind apart."""
    one, other, kind = start(), start(), start(b"other:")
    one.put_later({b"a": b"1", b"b": b"\0\xff"})
    one.put_later({b"c": b"3"})
    await one.aclose()
    assert await other.get_many([b"b", b"none", b"a", b"c"]) == [b"\0\xff", None, b"1", b"3"]
    assert await kind.get_many([b"a"]) == [None]
    assert await other.get_many([]) == []
    with redis.Redis.from_url(redis_server.url) as client:
        assert sorted(client.keys("*")) == [b"test:a", b"test:b", b"test:c"]
        assert all(0 < client.pttl(key) <= 60_000 for key in client.keys("*"))


async def test_many_bytes_are_written_a_part_at_a_time(start, redis_server):
    """Each part in one go; the end waits for all of them."""
    shared = start()
    shared.put_later({b"%d" % number: bytes(100_000) for number in range(50)})
    await shared.aclose()
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.dbsize() == 50


async def test_what_waits_is_bounded(start, redis_server):
    """More than that is not kept: it is a cache."""
    shared = start()
    size = MAX_WAITING_BYTES // 4
    shared.put_later({b"%d" % number: bytes(size) for number in range(10)})
    await shared.aclose()
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.dbsize() == 4


async def test_without_redis_nothing_is_found(start):
    """Neither reading nor writing raises, and nothing piles up."""
    shared = start(url="redis://127.0.0.1:1/0")
    assert await shared.get_many([b"a", b"b"]) == [None, None]
    shared.put_later({b"a": b"1"})
    await until(lambda: shared._writer is not None and shared._writer.done())
    assert shared._waiting_bytes == 0
    await asyncio.wait_for(shared.aclose(), 5)
