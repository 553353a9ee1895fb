"""The circuit breaker, on a clock that the test moves."""

import asyncio
import gc
from collections.abc import Callable

import pytest

from services.common.app import make_breaker, make_store
from services.common.breaker import STATES, Breaker, BreakerStatus, NotAFailure, Unproven
from services.common.errors import DependencyUnavailable
from services.common.metrics import Metrics
from services.search.settings import SearchSettings
from tests.virtual_time import Clock


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[..., Breaker]:
    """Return breakers on the test's clock: 10 s window, 4 calls, half of them failed, 2 s to the probe."""

    def make(**changes) -> Breaker:
        options = {"window_s": 10.0, "min_calls": 4, "failure_ratio": 0.5, "reset_s": 2.0, "clock": clock, **changes}
        return Breaker("peer", **options)

    return make


async def succeed(breaker: Breaker) -> None:
    """Make a call that goes well."""
    async with breaker.guard():
        pass


async def fail(breaker: Breaker) -> None:
    """Make a call that fails."""
    with pytest.raises(ConnectionError):
        async with breaker.guard():
            raise ConnectionError


async def opened(breaker: Breaker) -> Breaker:
    """Return *breaker*, open."""
    for _ in range(4):
        await fail(breaker)
    assert breaker.state == "open"
    return breaker


async def test_it_opens_on_the_share_of_failures(make):
    """Every second call failing opens it, though no two failures follow each other."""
    breaker = make()
    await succeed(breaker)
    await fail(breaker)
    await succeed(breaker)
    assert breaker.state == "closed"
    await fail(breaker)
    assert breaker.state == "open"


async def test_it_stays_closed_below_the_share(make):
    """One failure in three calls is under the ratio of one half, however many calls there are."""
    breaker = make()
    for _ in range(20):
        await succeed(breaker)
        await succeed(breaker)
        await fail(breaker)
    assert breaker.state == "closed"


async def test_few_calls_prove_nothing(make):
    """Failures open nothing before min_calls calls were made."""
    breaker = make()
    for _ in range(3):
        await fail(breaker)
    assert breaker.state == "closed"


async def test_a_busy_dependency_that_freezes_is_left_alone_soon(make, clock):
    """Failures in a row open it long before they are half of the window's calls; a success between starts anew."""
    breaker = make()
    for _ in range(500):
        await succeed(breaker)
    for _ in range(4):
        await fail(breaker)
    await succeed(breaker)
    for _ in range(4):
        await fail(breaker)
    assert breaker.state == "closed"
    await fail(breaker)
    assert breaker.state == "open"
    strict = make(in_a_row=1)
    await succeed(strict)
    await fail(strict)
    assert strict.state == "open"


async def test_asked_for_work_is_no_slowness(make, clock):
    """Time that a call says was work is not held against the dependency."""
    breaker = make()
    for _ in range(4):
        async with breaker.guard(slow_s=1.0) as permit:
            clock.now += 1.5
            permit.excused_s = 0.6
    assert breaker.state == "closed"


async def test_old_failures_are_forgotten(make, clock):
    """Only the calls of the last window count."""
    breaker = make()
    for _ in range(3):
        await fail(breaker)
    clock.now += 10.5
    await fail(breaker)
    assert breaker.state == "closed"
    for _ in range(3):
        await fail(breaker)
    assert breaker.state == "open"


async def test_slow_calls_count_as_failures(make, clock):
    """A peer that answers, but over the time that a call says is slow, opens it too; for bulk work none is."""
    breaker = make()
    for _ in range(8):
        async with breaker.guard():
            clock.now += 1.5
    assert breaker.state == "closed"
    clock.now += 11
    for _ in range(4):
        async with breaker.guard(slow_s=1.0):
            clock.now += 1.5
    assert breaker.state == "open"


async def test_an_open_breaker_refuses_without_a_try(make):
    """While it is open calls are refused at once, told when a retry may help."""
    breaker = await opened(make())
    assert breaker.would_refuse()
    with pytest.raises(DependencyUnavailable, match="peer is not answering") as caught:
        async with breaker.guard():
            pytest.fail("the call was made")
    assert caught.value.retry_after_s == 2.0


async def test_one_probe_at_a_time(make, clock):
    """After reset_s one call goes through; others are refused until it is done; its success closes the breaker."""
    breaker = await opened(make())
    clock.now += 2.1
    assert not breaker.would_refuse()
    async with breaker.guard():
        assert breaker.state == "half-open"
        assert breaker.would_refuse()
        with pytest.raises(DependencyUnavailable):
            await succeed(breaker)
    assert breaker.state == "closed"


async def test_a_failed_probe_opens_it_again_for_the_whole_time(make, clock):
    """A probe that fails starts the pause anew."""
    breaker = await opened(make())
    clock.now += 2.1
    await fail(breaker)
    assert breaker.state == "open"
    clock.now += 1.9
    assert breaker.would_refuse()
    clock.now += 0.2
    await succeed(breaker)
    assert breaker.state == "closed"


async def test_after_closing_the_past_is_forgotten(make, clock):
    """Failures of before the breaker opened do not open it again."""
    breaker = await opened(make())
    clock.now += 2.1
    await succeed(breaker)
    for _ in range(3):
        await fail(breaker)
    assert breaker.state == "closed"


async def test_a_cancelled_probe_gives_back_its_permit(make, clock):
    """A probe whose caller goes away neither closes nor opens the breaker, and the next call is the probe."""
    breaker = await opened(make())
    clock.now += 2.1
    entered = asyncio.Event()

    async def probe() -> None:
        async with breaker.guard():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(probe())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert breaker.state == "half-open"
    assert not breaker.would_refuse()
    await succeed(breaker)
    assert breaker.state == "closed"


async def test_what_is_not_a_failure_counts_neither_way(make, clock):
    """The caller's own bad input opens nothing, and as a probe's outcome closes nothing but frees the permit."""
    breaker = make()

    async def refused() -> None:
        with pytest.raises(NotAFailure):
            async with breaker.guard():
                raise NotAFailure

    for _ in range(10):
        await refused()
    assert breaker.state == "closed"
    for _ in range(3):
        await fail(breaker)
    assert breaker.state == "closed"
    await fail(breaker)
    assert breaker.state == "open"
    clock.now += 2.1
    await refused()
    assert breaker.state == "half-open"
    assert not breaker.would_refuse()


async def test_a_call_that_outlives_the_opening_changes_nothing(make, clock):
    """A call begun while it was closed, and done after it opened, neither closes it nor starts its pause anew."""
    breaker = make()
    async with breaker.guard():
        await opened(breaker)
        clock.now += 1.9
    assert breaker.state == "open"
    clock.now += 0.2
    assert not breaker.would_refuse()


async def test_old_calls_that_fail_do_not_open_it_again(make, clock):
    """Calls begun before it opened, which fail once it is closed again, are old news."""
    breaker = make()
    ends = [asyncio.Event() for _ in range(6)]

    async def failing(end: asyncio.Event) -> None:
        async with breaker.guard():
            await end.wait()
            raise ConnectionError

    tasks = [asyncio.create_task(failing(end)) for end in ends]
    await asyncio.sleep(0)
    await opened(breaker)
    clock.now += 2.1
    await succeed(breaker)
    for end in ends:
        end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert breaker.state == "closed"
    assert breaker.status.calls == 0


async def test_a_probe_without_an_answer_has_not_shown_that_all_is_well(make, clock):
    """A caller in a hurry opens nothing, but as the probe it leaves the peer alone for another pause."""
    breaker = make()

    async def hasty() -> None:
        with pytest.raises(Unproven):
            async with breaker.guard():
                raise Unproven

    for _ in range(10):
        await hasty()
    assert breaker.state == "closed"
    await opened(breaker)
    clock.now += 2.1
    await hasty()
    assert breaker.state == "open"
    assert breaker.would_refuse()


async def test_its_status_says_since_when_and_why(make, clock):
    """The state, how long ago it opened, and the calls and failures of the window."""
    breaker = make()
    await succeed(breaker)
    await fail(breaker)
    assert breaker.status == BreakerStatus("closed", None, calls=2, failures=1)
    clock.now += 11
    assert breaker.status == BreakerStatus("closed", None, calls=0, failures=0)
    await opened(breaker)
    clock.now += 1.5
    assert breaker.status == BreakerStatus("open", 1.5, calls=4, failures=4)


async def test_each_state_is_reported(make, clock):
    """The metric's callback hears of the first state and of each change."""
    heard: list[int] = []
    breaker = await opened(make(on_state=heard.append))
    clock.now += 2.1
    await fail(breaker)
    clock.now += 2.1
    await succeed(breaker)
    names = ["closed", "open", "half-open", "open", "half-open", "closed"]
    assert heard == [STATES[name] for name in names]


async def test_others_can_wait_until_the_probe_is_over(make, clock):
    """They are told however it ends, and at once where there is none under way."""
    breaker = await opened(make())
    await breaker.probe_over()
    clock.now += 2.0
    answered = asyncio.Event()

    async def probe() -> None:
        async with breaker.guard():
            await answered.wait()

    probing = asyncio.create_task(probe())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(breaker.probe_over())
    await asyncio.sleep(0)
    assert breaker.is_probing
    assert not waiting.done()
    answered.set()
    await asyncio.wait_for(waiting, 5)
    await probing
    assert (breaker.is_probing, breaker.state) == (False, "closed")


def test_the_state_is_in_the_metrics_while_the_breaker_is_used() -> None:
    """One that is gone, as its address is, has no state; one made for the same name meanwhile keeps its own."""
    metrics, settings = Metrics("test"), SearchSettings()

    def states() -> dict[str, float]:
        (family,) = metrics.breaker_state.collect()
        return {sample.labels["dependency"]: sample.value for sample in family.samples}

    first, other = make_breaker("node", settings, metrics), make_breaker("redis", settings, metrics)
    again = make_breaker("node", settings, metrics)
    del first
    gc.collect()
    assert states() == {"node": 0, "redis": 0}
    del again
    gc.collect()
    assert states() == {"redis": 0}
    assert metrics.breakers == {"redis": other}


async def test_the_first_probe_may_come_soon_and_the_next_ones_later(make, clock):
    """Each that fails doubles the pause, up to the usual one; after one that went well it is short again."""
    breaker = make(in_a_row=1, reset_s=1.0, first_reset_s=0.2)
    for _ in range(2):
        await fail(breaker)
        for pause_s in (0.2, 0.4, 0.8, 1.0, 1.0):
            clock.now += pause_s - 0.01
            assert breaker.would_refuse()
            clock.now += 0.02
            assert not breaker.would_refuse()
            await fail(breaker)
        clock.now += 1.01
        await succeed(breaker)
        assert breaker.state == "closed"


async def test_the_stores_breaker_opens_at_once_and_asks_again_soon():
    """One time-out pauses it for a tenth of a second, not for the usual time."""
    breaker = make_store("redis", "redis://127.0.0.1:1/0", SearchSettings(), Metrics("search")).breaker
    await succeed(breaker)
    await fail(breaker)
    assert breaker.would_refuse()
    await asyncio.sleep(0.15)
    assert not breaker.would_refuse()
