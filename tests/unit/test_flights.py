"""Single flight: once for all, and one caller's end or hurry is no other's."""

import asyncio

import pytest

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, Overloaded
from services.search.flights import Flights


class Maker:
    """Makes numbers, counting; each making waits for `gate` and raises the next of *errors*, None for none."""

    def __init__(self, *errors: Exception | None) -> None:
        self.begun = self.cancelled = self.joined = 0
        self.gate = asyncio.Event()
        self.errors = list(errors)
        self.asked: list[tuple[int, bool, bool]] = []
        self.flights: Flights[int] = Flights(joined=self._join)

    def _join(self) -> None:
        self.joined += 1

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        error = self.errors.pop(0) if self.errors else None
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if error is not None:
            raise error
        return number

    def ask(self, *, timeout_s: float = 30.0, serves: bool = True, key: str = "k") -> "asyncio.Task[int]":
        async def good(found: int, older: bool, hurried: bool) -> bool:
            self.asked.append((found, older, hurried))
            return serves or not older

        return asyncio.create_task(self.flights.once(key, Deadline.after(timeout_s), self, good=good))


async def settled() -> None:
    """Let all that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_many_callers_share_one_making() -> None:
    """Those who ask at the same time get what the first one's flight makes; those who ask later another."""
    maker = Maker()
    tasks = [maker.ask() for _ in range(5)]
    await settled()
    maker.gate.set()
    assert await asyncio.gather(*tasks) == [1] * 5
    assert (maker.joined, maker.flights.under_way) == (4, 0)
    assert await maker.ask() == 2


async def test_keys_are_apart() -> None:
    """Another key is another flight."""
    maker = Maker()
    maker.gate.set()
    assert sorted(await asyncio.gather(maker.ask(key="a"), maker.ask(key="b"))) == [1, 2]


async def test_a_cancelled_leader_fails_nobody() -> None:
    """The leader's caller leaves: its flight goes on for the others."""
    maker = Maker()
    leader, *others = [maker.ask() for _ in range(3)]
    await settled()
    leader.cancel()
    await settled()
    maker.gate.set()
    assert await asyncio.gather(*others) == [1, 1]
    assert leader.cancelled()
    assert (maker.begun, maker.cancelled) == (1, 0)


async def test_nothing_runs_on_for_nobody() -> None:
    """When the last caller has left, what was made for them is cancelled, and the next one begins anew."""
    maker = Maker()
    tasks = [maker.ask() for _ in range(3)]
    await settled()
    for task in tasks:
        task.cancel()
    await settled()
    assert (maker.cancelled, maker.flights.under_way) == (1, 0)
    maker.gate.set()
    assert await maker.ask() == 2


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), Overloaded("full")])
async def test_a_leader_out_of_time_or_room_fails_only_itself(error: Exception) -> None:
    """Its followers make the answer for themselves, once for all of them."""
    maker = Maker(error)
    tasks = [maker.ask(timeout_s=1.0), *(maker.ask() for _ in range(3))]
    await settled()
    maker.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results == [error, 2, 2, 2]


async def test_other_failures_are_everybodys() -> None:
    """What is down for the leader is down for those who wait: they do not try it one after the other."""
    error = DependencyUnavailable("down")
    maker = Maker(error)
    tasks = [maker.ask() for _ in range(4)]
    await settled()
    maker.gate.set()
    assert await asyncio.gather(*tasks, return_exceptions=True) == [error] * 4
    assert maker.begun == 1


async def test_a_result_that_does_not_serve_is_made_again_once() -> None:
    """Those for whom the flight began too early share the next one, which began after they asked."""
    maker = Maker()
    tasks = [maker.ask(), *(maker.ask(serves=False) for _ in range(3))]
    await settled()
    maker.gate.set()
    assert await asyncio.gather(*tasks) == [1, 2, 2, 2]
    assert maker.asked == [(1, True, False)] * 3 + [(2, False, False)] * 2


async def test_whoever_has_less_time_than_the_leader_goes_alone() -> None:
    """A caller in a hurry does not wait for what has more time than it."""
    maker = Maker()
    slow = maker.ask(timeout_s=30.0)
    await settled()
    quick = maker.ask(timeout_s=1.0)
    await settled()
    assert maker.begun == 2
    maker.gate.set()
    assert (await slow, await quick) == (1, 2)


async def test_a_follower_is_told_of_a_leader_in_a_hurry() -> None:
    """What was made with less time may be worth less."""
    maker = Maker()
    tasks = [maker.ask(timeout_s=10.0), maker.ask(timeout_s=30.0)]
    await settled()
    maker.gate.set()
    assert await asyncio.gather(*tasks) == [1, 1]
    assert maker.asked == [(1, True, True)]


async def test_a_follower_waits_no_longer_than_it_may() -> None:
    """At its own deadline a follower gives up, and the leader does not notice."""
    maker = Maker()
    leader = maker.ask(timeout_s=0.1)
    await settled()
    with pytest.raises(DeadlineExceeded):
        await maker.ask(timeout_s=0.05)
    maker.gate.set()
    assert await leader == 1
