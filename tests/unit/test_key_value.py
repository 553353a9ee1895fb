"""The key-value store against a real Redis that dies, freezes, refuses, and against one that only pretends."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import redis

from services.common.breaker import Breaker
from services.common.key_value import KeyValueStore
from tests.redis_server import RedisServer


@pytest.fixture
def breaker() -> Breaker:
    """A breaker as the services make it for Redis: one failure is enough."""
    return Breaker("redis", in_a_row=1, reset_s=0.05)


@pytest.fixture
async def store(redis_server: RedisServer, breaker: Breaker) -> AsyncIterator[KeyValueStore]:
    """The store in a real Redis, with one value in it."""
    store = KeyValueStore(redis_server.url, breaker, timeout_s=0.2)
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("a", b"1")
    yield store
    await store.aclose()


async def read(store: KeyValueStore) -> bytes | None:
    """Return what is under `a`."""
    return await store.attempt(lambda redis: redis.get("a"))


async def test_what_the_event_loop_says_of_a_reset_connection_is_a_failure(store: KeyValueStore) -> None:
    """uvloop raises RuntimeError where one writes to a connection that was reset: nothing is returned, nothing is raised."""

    async def operation(_redis: redis.asyncio.Redis) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    assert await store.attempt(operation) is None
    assert not store.available
    assert store.breaker.state == "open"


async def test_a_frozen_redis_costs_one_time_out(redis_server: RedisServer, store: KeyValueStore) -> None:
    """The first read is late, those after it do not wait at all, and once Redis goes on it is used again."""
    assert await read(store) == b"1"
    redis_server.freeze()
    try:
        assert await read(store) is None
        assert not store.available
        assert store.breaker.state == "open"
        asked = 0

        async def operation(_redis: redis.asyncio.Redis) -> None:
            nonlocal asked
            asked += 1

        assert await store.attempt(operation) is None
        assert asked == 0
    finally:
        redis_server.thaw()
    async with asyncio.timeout(10):
        while await read(store) != b"1":
            await asyncio.sleep(0.01)
    assert store.available
    assert store.breaker.state == "closed"


async def test_what_redis_refuses_is_no_sign_that_it_is_unwell(redis_server: RedisServer, store: KeyValueStore) -> None:
    """A store that is read-only, or out of memory, refuses writes, and is read all the same."""
    with redis.Redis.from_url(redis_server.url) as client:
        for setting, refusing, usual in (("min-replicas-to-write", "1", "0"), ("maxmemory", "1", "0")):
            client.config_set(setting, refusing)
            try:
                assert await store.attempt(lambda redis: redis.set("b", b"2")) is None
                assert await read(store) == b"1"
            finally:
                client.config_set(setting, usual)
        client.rpush("list", "x")
        assert await store.attempt(lambda redis: redis.get("list")) is None
        client.delete("list")
    assert store.available
    assert store.breaker.status.failures == 0
    assert await store.attempt(lambda redis: redis.set("b", b"2"))


async def test_more_callers_than_connections_wait_for_their_turn(redis_server: RedisServer, breaker: Breaker) -> None:
    """A burst is served by few connections, and none of it fails."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("a", b"1")
        before = client.info("stats")["total_connections_received"]
        store = KeyValueStore(redis_server.url, breaker, timeout_s=5.0, max_connections=4)
        assert await asyncio.gather(*(read(store) for _ in range(100))) == [b"1"] * 100
        assert client.info("stats")["total_connections_received"] - before == 4
    await store.aclose()


async def test_an_answer_that_has_come_is_read_though_this_process_was_busy(
    redis_server: RedisServer, breaker: Breaker
) -> None:
    """A loop that was held up for longer than the time-out does not make Redis late."""
    store = KeyValueStore(redis_server.url, breaker, timeout_s=0.05)
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("a", b"1")
    assert await read(store) == b"1"
    reading = asyncio.create_task(read(store))
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251
    assert await reading == b"1"
    await store.aclose()


async def test_answers_are_never_mixed_up(redis_server: RedisServer, store: KeyValueStore) -> None:
    """After an operation that was cut off its connection is closed: no other reads its answer."""
    with redis.Redis.from_url(redis_server.url) as client:
        for number in range(50):
            client.set(f"n{number}", str(number))
    for number in range(0, 50, 2):
        task = asyncio.create_task(store.attempt(lambda redis, number=number: redis.get(f"n{number}")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = await store.attempt(lambda redis, number=number: redis.get(f"n{number + 1}"))
        assert found == str(number + 1).encode()
    assert store.breaker.status.failures == 0


async def test_a_server_that_speaks_something_else_is_unavailable(breaker: Breaker) -> None:
    """Garbage in place of Redis's protocol is a miss, and counts against it."""

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        store = KeyValueStore(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", breaker, timeout_s=1.0)
        assert await read(store) is None
        assert breaker.state == "open"
        await store.aclose()
