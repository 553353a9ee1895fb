"""What admission makes of load below, at and above what a server can do, in virtual time."""

import asyncio

import pytest

from services.common.admission import Admission
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded
from services.common.wire.search import Priority
from tests.admission_load import Workers, admission_of, load
from tests.virtual_time import VirtualLoop, run_virtually


def test_goodput_stays_at_the_peak_when_three_times_the_capacity_arrives() -> None:
    """A step from half the capacity to three times and back loses next to nothing of it, and leaves nothing waiting."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)
        before, over, after = await load(loop, Workers(admission, 4, 0.01).serve, [(200, 5), (1200, 10), (200, 5)])
        assert not before.shed
        assert not before.late
        assert over.goodput >= 0.95 * 400
        assert over.late.total() <= 0.01 * over.good.total()
        assert after.shed.total() <= 5
        assert not after.late
        assert (admission.in_flight, admission.waiting) == (0.0, 0)

    run_virtually(main)


def test_the_least_urgent_are_turned_away_first() -> None:
    """With three times the capacity, all that is of high priority is answered, and hardly any of the low."""

    async def main(loop: VirtualLoop) -> None:
        mix: list[tuple[Priority, float]] = [("high", 0.2), ("normal", 0.3), ("low", 0.5)]
        (over,) = await load(loop, Workers(admission_of(loop), 4, 0.01).serve, [(1200, 10)], priorities=mix)
        assert over.shed["high"] <= 0.01 * over.good["high"]
        assert over.good["normal"] > 0.3 * over.shed["normal"]
        assert over.good["low"] < 0.05 * over.shed["low"]
        assert over.goodput >= 0.95 * 400

    run_virtually(main)


def test_a_slow_dependency_is_no_overload() -> None:
    """Where work takes 1.5 s instead of 5 ms though nothing is busy, more of it is let in and nobody turned away."""

    async def main(loop: VirtualLoop) -> None:
        workers = Workers(admission_of(loop), 4, 0.005)
        loop.call_later(5, setattr, workers, "delay_s", 1.5)
        loop.call_later(15, setattr, workers, "delay_s", 0.0)
        (tally,) = await load(loop, workers.serve, [(50, 25)], timeout_s=3.0)
        assert not tally.shed
        assert not tally.late

    run_virtually(main)


class Nodes(Workers):
    """Servers of others, which go on with what nobody waits for any more."""

    async def serve(self, priority: Priority, deadline: Deadline) -> None:
        async with self._admission.enter(self._cost, priority, deadline):
            await asyncio.shield(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        async with self._free:
            await asyncio.sleep(self._cost * self._unit_s)


def test_a_dependency_that_can_do_less_is_not_buried() -> None:
    """Where it suddenly does 130 a second of 300 that come, nearly so many are answered in time, and all once it is well."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)
        nodes = Nodes(admission, 4, 0.01)
        loop.call_later(5, setattr, nodes, "_unit_s", 4 / 130)
        loop.call_later(25, setattr, nodes, "_unit_s", 0.01)
        _, onset, under, _, after = await load(loop, nodes.serve, [(300, 5), (300, 5), (300, 15), (300, 2), (300, 5)])
        assert under.goodput >= 0.9 * 130
        assert under.late.total() <= 0.02 * under.good.total()
        assert onset.goodput >= 0.3 * 130  # What was let in before that is worked off first.
        assert after.goodput >= 0.98 * 300

    run_virtually(main)


def test_the_limit_comes_down_under_load_and_returns_after_it() -> None:
    """The limit that overload found is what the server does in a fifth of a second, and is forgotten with the load."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)
        at_rest = admission.limit
        await load(loop, Workers(admission, 4, 0.01).serve, [(200, 5), (1200, 10)])
        assert 0.8 * 400 * 0.2 <= admission.limit <= 1.2 * 400 * 0.2
        await load(loop, Workers(admission, 4, 0.01).serve, [(50, 60)])
        assert admission.limit > 0.9 * at_rest

    run_virtually(main)


class BusyLoop:
    """A service whose own event loop is the bottleneck: 350 answers a second of 2.8 ms each, and a refusal is not free."""

    def __init__(self, loop: VirtualLoop, admission: Admission, *, door: bool) -> None:
        self._loop = loop
        self._admission = admission
        self._door = door

    async def serve(self, priority: Priority, _deadline: Deadline) -> None:
        self._loop.spend(0.0001)
        leave = self._admission.visit(priority) if self._door else lambda: None
        try:
            await asyncio.sleep(0)
            self._loop.spend(0.0003)
            async with self._admission.enter(1.6, priority, Deadline(self._loop.time() + 1.0)):
                for _ in range(4):
                    self._loop.spend(0.0006)
                    await asyncio.sleep(0.002)
        finally:
            leave()


@pytest.mark.parametrize(("times", "door", "least"), [(3, True, 0.8), (6, True, 0.6), (3, False, 0.0)])
def test_those_turned_away_unread_leave_the_time_to_the_others(times: int, door: bool, least: float) -> None:
    """Where the event loop is what is short, goodput holds as long as most are turned away before they are read."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=16.0)
        service = BusyLoop(loop, admission, door=door)
        _, over, after = await load(loop, service.serve, [(200, 5), (times * 350, 15), (200, 5)])
        assert over.goodput >= least * 350
        if not door:
            assert over.goodput < 0.75 * 350
        assert after.goodput >= 0.95 * 200
        assert (admission.in_flight, admission.waiting) == (0.0, 0)

    run_virtually(main)


def test_what_fails_fast_does_not_pass_for_fast_work() -> None:
    """After a while in which everything failed within a millisecond, ordinary work is not thought slow."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)

        async def fail(priority: Priority, deadline: Deadline) -> None:
            async with admission.enter(1.0, priority, deadline):
                await asyncio.sleep(0.001)
                raise DeadlineExceeded("late")

        workers = Workers(admission, 4, 0.01)
        await load(loop, workers.serve, [(100, 3)])
        await load(loop, fail, [(300, 5)])
        (tally,) = await load(loop, workers.serve, [(380, 10)])
        assert not tally.shed
        assert not tally.late

    run_virtually(main)


def test_pressure_is_none_until_somebody_waits_for_long() -> None:
    """Below capacity it is 0, and those let in are told so; in overload it is 1."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)
        told: list[float] = []

        free = asyncio.Semaphore(4)

        async def work(priority: Priority, deadline: Deadline) -> None:
            async with admission.enter(1.0, priority, deadline) as admitted:
                told.append(admitted.pressure)
                async with free:
                    await asyncio.sleep(0.01)

        await load(loop, work, [(200, 5)])
        assert set(told) == {0.0}
        told.clear()
        await load(loop, work, [(1200, 5)])
        assert max(told) == 1.0

    run_virtually(main)
