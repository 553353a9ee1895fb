"""Token buckets: what is admitted and what is not, in this process and in a real Redis that several share and that dies."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import redis

from services.common.breaker import Breaker
from services.common.errors import RateLimited
from services.common.governor import KEY_PREFIX, Governor, Limits
from services.common.key_value import KeyValueStore
from tests.redis_server import PATIENCE_S, RedisServer
from tests.virtual_time import Clock

SLOW = 0.001  # So few a second that no test is long enough to see one come back.


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def governor(clock: Clock) -> Governor:
    """Buckets in this process."""
    return Governor("test", clock=clock)


async def admitted(governor: Governor, limits: Limits, attempts: int, caller: str = "a") -> int:
    """Return how many of so many requests are admitted."""
    count = 0
    for _ in range(attempts):
        try:
            await governor.admit(caller, limits)
        except RateLimited:
            continue
        count += 1
    return count


async def refused(governor: Governor, limits: Limits, caller: str = "a") -> RateLimited:
    """Return the error of a request that must be refused."""
    with pytest.raises(RateLimited) as caught:
        await governor.admit(caller, limits)
    return caught.value


async def test_a_burst_and_then_the_rate(governor, clock):
    """A full bucket admits its burst at once, then one for each that flowed in, and never more than the burst."""
    limits = Limits(requests_per_s=80.0, requests_burst=50)
    assert await admitted(governor, limits, 60) == 50
    clock.now += 0.125
    assert await admitted(governor, limits, 20) == 10
    clock.now += 3600
    assert await admitted(governor, limits, 60) == 50


async def test_a_refusal_says_when_to_come_again(governor, clock):
    """Exactly then one is admitted; a refused attempt costs nothing."""
    limits = Limits(requests_per_s=0.25, requests_burst=1)
    await governor.admit("a", limits)
    error = await refused(governor, limits)
    assert error.retry_after_s == pytest.approx(4.0)
    assert "0.25 requests/s with bursts of 1" in error.message
    clock.now += 3.0
    assert (await refused(governor, limits)).retry_after_s == pytest.approx(1.0)
    clock.now += 1.0
    await governor.admit("a", limits)


async def test_callers_have_buckets_of_their_own(governor):
    """One that used up its own takes nothing from another."""
    limits = Limits(requests_per_s=SLOW, requests_burst=2)
    assert await admitted(governor, limits, 5, "a") == 2
    assert await admitted(governor, limits, 5, "b") == 2


async def test_tokens_may_go_into_debt_and_are_paid_off(governor, clock):
    """Work is charged when it is done; in debt nothing is admitted until it flowed in again."""
    limits = Limits(tokens_per_s=10.0, tokens_burst=100)
    await governor.admit("a", limits)
    governor.charge("a", limits, 150)
    error = await refused(governor, limits)
    assert error.retry_after_s == pytest.approx(5.0)
    assert "10 tokens/s with bursts of 100" in error.message
    clock.now += 5.0
    await governor.admit("a", limits)
    assert await admitted(governor, limits, 5, "b") == 5


async def test_without_limits_nothing_is_counted(governor):
    """A rate of 0 is no limit, whatever is charged."""
    governor.charge("a", Limits(requests_per_s=SLOW), 10**9)
    governor.charge("a", Limits(tokens_per_s=SLOW), 0)
    assert await admitted(governor, Limits(), 100) == 100


async def test_a_clock_that_goes_back_gives_nothing(governor, clock):
    """It costs nothing either."""
    limits = Limits(requests_per_s=1.0, requests_burst=3)
    assert await admitted(governor, limits, 2) == 2
    clock.now -= 1000
    assert await admitted(governor, limits, 2) == 1


async def test_the_longest_unseen_caller_is_forgotten_first(clock):
    """However many addresses there are, memory is bounded, and whoever keeps calling stays limited."""
    governor = Governor("test", clock=clock, max_callers=10)
    limits = Limits(requests_per_s=SLOW, requests_burst=1)
    await governor.admit("busy", limits)
    for number in range(100):
        await governor.admit(f"caller {number}", limits)
        await refused(governor, limits, "busy")
    assert await admitted(governor, limits, 1, "caller 99") == 0
    assert await admitted(governor, limits, 1, "caller 0") == 1


def shared(server: RedisServer) -> Governor:
    """Return the buckets in that Redis, as one process of several has them."""
    return Governor("test", KeyValueStore(server.url, Breaker("redis", min_calls=3, reset_s=0.02), timeout_s=2.0))


@pytest.fixture
async def pair(redis_server: RedisServer) -> AsyncIterator[tuple[Governor, Governor]]:
    """Two processes' governors over one Redis."""
    both = shared(redis_server), shared(redis_server)
    yield both
    for governor in both:
        await governor.aclose()


@pytest.fixture
def caller() -> str:
    """A caller whom no other test knows."""
    return uuid.uuid4().hex


async def test_two_processes_share_a_bucket(pair, caller):
    """Together they admit one burst, even when they ask at the same time."""
    limits = Limits(requests_per_s=SLOW, requests_burst=50)
    counts = await asyncio.gather(*(admitted(governor, limits, 40, caller) for governor in pair))
    assert sum(counts) == 50
    assert min(counts) > 0
    assert 0 < (await refused(pair[0], limits, caller)).retry_after_s <= 1 / SLOW


async def test_a_crowd_is_counted_by_redis_too(pair, caller):
    """However many ask at once, none falls back on the buckets of its process."""
    limits = Limits(requests_per_s=SLOW, requests_burst=20)
    counts = await asyncio.gather(*(admitted(pair[number % 2], limits, 1, caller) for number in range(400)))
    assert sum(counts) == 20


async def test_a_debt_made_in_one_process_holds_in_the_other(pair, caller):
    """Charges reach Redis soon, at the latest when the process that made them stops."""
    one, other = pair
    limits = Limits(tokens_per_s=1.0, tokens_burst=10)
    await other.admit(caller, limits)
    one.charge(caller, limits, 1010)
    await one.aclose()
    assert (await refused(other, limits, caller)).retry_after_s == pytest.approx(1000, abs=PATIENCE_S)


async def test_the_bucket_fills_by_the_clock_of_redis(pair, caller):
    """A fast rate is soon back; the key goes once the bucket is full."""
    limits = Limits(requests_per_s=1000.0, requests_burst=1)
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(5):
            while not await admitted(pair[0], limits, 1, caller):
                await asyncio.sleep(0.001)


async def test_keys_expire(redis_server, pair, caller):
    """What is full again is not kept."""
    limits = Limits(requests_per_s=0.1, requests_burst=5)
    await pair[0].admit(caller, limits)
    with redis.Redis.from_url(redis_server.url) as client:
        lasts_ms = client.pttl(f"{KEY_PREFIX}:test:{caller}")
    assert 0 < lasts_ms <= 10_000


async def test_a_redis_that_has_forgotten_the_script_is_told_it_again(redis_server, pair, caller):
    """A restarted or flushed Redis has no scripts."""
    limits = Limits(requests_per_s=SLOW, requests_burst=2)
    await pair[0].admit(caller, limits)
    with redis.Redis.from_url(redis_server.url) as client:
        client.script_flush()
    assert await admitted(pair[0], limits, 3, caller) == 1


async def test_a_key_of_another_type_is_no_failure(redis_server, pair, caller):
    """Then the limit holds in this process."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.set(f"{KEY_PREFIX}:test:{caller}", "somebody else's")
    assert await admitted(pair[0], Limits(requests_per_s=SLOW, requests_burst=2), 5, caller) == 2


async def test_a_redis_that_dies_leaves_the_limit_in_each_process(redis_server, caller):
    """Requests go on being admitted and refused, by this process's own bucket; when it is back, by the shared one."""
    governor = shared(redis_server)
    limits = Limits(requests_per_s=SLOW, requests_burst=4, tokens_per_s=SLOW, tokens_burst=10)
    assert await admitted(governor, limits, 3, caller) == 3
    redis_server.kill()
    try:
        assert await admitted(governor, limits, 10, caller) == 4
        governor.charge(f"{caller} 2", limits, 50)
        async with asyncio.timeout(PATIENCE_S):
            while await admitted(governor, limits, 1, f"{caller} 2"):
                await asyncio.sleep(0.01)
    finally:
        redis_server.start()
    async with asyncio.timeout(PATIENCE_S):
        while not await admitted(governor, limits, 1, caller):
            await asyncio.sleep(0.01)
    await governor.aclose()
