"""Admission, in virtual time: a server of known capacity behind it, and load below and above that."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from prometheus_client import generate_latest

from services.common.adaptive_limit import AdaptiveLimit, Load
from services.common.admission import Admission, open_admission
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, Overloaded
from services.common.metrics import Metrics
from services.common.wire.search import Priority
from tests.virtual_time import VirtualLoop, run_virtually

Serve = Callable[[Priority, Deadline], Awaitable[None]]
ALL_NORMAL: Sequence[tuple[Priority, float]] = (("normal", 1.0),)


@dataclass
class Tally:
    """What became of the requests of one stretch of load."""

    seconds: float
    good: Counter[Priority] = field(default_factory=Counter)
    late: Counter[Priority] = field(default_factory=Counter)
    shed: Counter[Priority] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        """Answers in time, per second."""
        return self.good.total() / self.seconds


async def load(
    loop: VirtualLoop,
    serve: Serve,
    stretches: Sequence[tuple[float, float]],
    *,
    timeout_s: float = 1.0,
    priorities: Sequence[tuple[Priority, float]] = ALL_NORMAL,
) -> list[Tally]:
    """Send an open loop of Poisson arrivals, (rate, seconds) by stretch, and return what became of each stretch."""
    draw = random.Random(7)
    tallies, tasks, due = [], [], loop.time()

    async def one(tally: Tally, priority: Priority, due: float) -> None:
        try:
            async with asyncio.timeout_at(due + timeout_s):
                await serve(priority, Deadline(loop.time() + timeout_s))
        except Overloaded:
            tally.shed[priority] += 1
        except (TimeoutError, DeadlineExceeded):
            tally.late[priority] += 1
        else:
            (tally.good if loop.time() <= due + timeout_s else tally.late)[priority] += 1

    for rate, seconds in stretches:
        tallies.append(Tally(seconds))
        end = due + seconds
        while (due := due + draw.expovariate(rate)) < end:
            if due > loop.time():  # As with a real one, all that came meanwhile is there at once.
                await asyncio.sleep(due - loop.time())
            names, shares = zip(*priorities, strict=True)
            tasks.append(asyncio.create_task(one(tallies[-1], draw.choices(names, shares)[0], due)))
    await asyncio.gather(*tasks)
    return tallies


class Workers:
    """A model server: *count* at once, each taking *unit_s* for a unit of cost, and *delay_s* more that costs nobody anything."""

    def __init__(self, admission: Admission, count: int, unit_s: float, *, cost: float = 1.0) -> None:
        self._admission = admission
        self._free = asyncio.Semaphore(count)
        self._unit_s = unit_s
        self._cost = cost
        self.delay_s = 0.0

    async def serve(self, priority: Priority, deadline: Deadline) -> None:
        async with self._admission.enter(self._cost, priority, deadline):
            async with self._free:
                await asyncio.sleep(self._cost * self._unit_s)
            await asyncio.sleep(self.delay_s)


def admission_of(loop: VirtualLoop, **options: float) -> Admission:
    return Admission("searches", clock=loop.time, **options)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(("given_up_after_s", "grows"), [(0.03, True), (1.0, False)])
def test_who_is_in_haste_does_not_pass_for_overload(given_up_after_s: float, grows: bool) -> None:
    """Work that takes 1.5 s instead of 10 ms, and a fifth of the callers give up: early it says nothing, late it does."""
    limit = AdaptiveLimit(floor=2.0, ceiling=1024.0, start=64.0, now=0.0)
    busy = Load(used_up=True, wanted=True, idle=False, keeps_up=True)
    for tick in range(1, 100):
        slow = tick > 20
        for number in range(2 if slow else 10):
            limit.ended(1.0, 1.5 if slow else 0.01)
            if slow and number % 2:
                limit.failed(1.0, given_up_after_s)
        limit.look(tick * 0.1, busy)
        if tick == 20:
            before = limit.limit
    assert (limit.limit > before) == grows


def test_the_limit_comes_down_under_load_and_returns_after_it() -> None:
    """The limit that overload found is near what the server can do at once, and is forgotten when the load is gone."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)
        at_rest = admission.limit
        await load(loop, Workers(admission, 4, 0.01).serve, [(200, 5), (1200, 10)])
        assert 4 <= admission.limit < 0.4 * at_rest
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


async def hold(admission: Admission, cost: float, priority: Priority = "normal", seconds: float = 1.0) -> float:
    """Work for *seconds* and return how long it waited before."""
    async with admission.enter(cost, priority, NO_DEADLINE) as admitted:
        await asyncio.sleep(seconds)
        return admitted.waited_s


def test_the_more_urgent_go_first_and_equals_in_their_order() -> None:
    """What waits gets its turn by priority, then by arrival."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=1.0, ceiling=1.0)
        order: list[str] = []

        async def one(name: str, priority: Priority) -> None:
            await hold(admission, 1.0, priority)
            order.append(name)

        wanted: list[tuple[str, Priority]] = [
            ("first", "low"), ("low", "low"), ("normal", "normal"), ("high", "high"), ("high too", "high")
        ]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for name, priority in wanted:
                group.create_task(one(name, priority))
        assert order == ["first", "high", "high too", "normal", "low"]

    run_virtually(main)


def test_a_wait_that_would_outlast_the_deadline_is_refused_at_once() -> None:
    """With work of a second under way and more waiting, half a second is too little: Overloaded now, with Retry-After."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=1.0, ceiling=1.0)
        await hold(admission, 1.0)
        tasks = [asyncio.create_task(hold(admission, 1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        began = loop.time()
        with pytest.raises(Overloaded) as refused:
            async with admission.enter(1.0, "normal", Deadline(loop.time() + 0.5)):
                pass
        assert loop.time() == began
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1.0
        assert admission.pressure == 1.0
        await asyncio.gather(*tasks)

    run_virtually(main)


def test_who_waits_is_refused_while_there_is_still_time_to_do_something_else() -> None:
    """A wait that was thought to be short and is not ends at half of the time left, not at the deadline."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=1.0, ceiling=1.0)
        busy = asyncio.create_task(hold(admission, 1.0, seconds=10.0))
        await asyncio.sleep(0)
        began = loop.time()
        with pytest.raises(Overloaded):
            async with admission.enter(1.0, "normal", Deadline(loop.time() + 2.0)):
                pass
        assert loop.time() - began == pytest.approx(1.0)
        busy.cancel()

    run_virtually(main)


def test_what_comes_after_its_deadline_is_not_let_in() -> None:
    """A deadline that has passed is said to have passed: that is no overload."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop)
        with pytest.raises(DeadlineExceeded):
            async with admission.enter(1.0, "high", Deadline(loop.time() - 0.1)):
                pass
        assert admission.in_flight == 0.0

    run_virtually(main)


def test_a_full_queue_sheds_the_newest_of_the_least_urgent() -> None:
    """The one that makes place is the last that came of the lowest priority; who finds none lower is refused himself."""

    async def main(loop: VirtualLoop) -> None:
        shed: list[Priority] = []
        admission = Admission("searches", floor=1.0, ceiling=1.0, max_waiting=2, clock=loop.time, note_shed=shed.append)
        under_way = asyncio.create_task(hold(admission, 1.0))
        await asyncio.sleep(0)
        older, newer = (asyncio.create_task(hold(admission, 1.0, "low")) for _ in range(2))
        await asyncio.sleep(0)
        urgent = asyncio.create_task(hold(admission, 1.0, "high"))
        await asyncio.sleep(0)
        assert admission.waiting == 2
        with pytest.raises(Overloaded):
            await newer
        with pytest.raises(Overloaded):
            await hold(admission, 1.0, "low")
        assert shed == ["low", "low"]
        assert [round(await one) for one in (under_way, urgent, older)] == [0, 1, 2]

    run_virtually(main)


def test_what_is_cancelled_gives_its_place_back() -> None:
    """Cancelled while it waits, while it works, or in the very moment its turn came, it leaves nothing behind."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=1.0, ceiling=1.0)
        working = asyncio.create_task(hold(admission, 1.0))
        await asyncio.sleep(0)
        waiting, next_one = (asyncio.create_task(hold(admission, 1.0)) for _ in range(2))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert (admission.waiting, admission.in_flight) == (1, 1.0)
        working.cancel()
        loop.call_soon(next_one.cancel)
        await asyncio.gather(working, waiting, next_one, return_exceptions=True)
        assert (admission.waiting, admission.in_flight) == (0, 0.0)
        assert await hold(admission, 1.0) == 0.0

    run_virtually(main)


def test_a_turn_is_not_given_to_one_just_cancelled() -> None:
    """Between the cancelling of one that waits and its noticing, a place that is given back goes to the next."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=1.0, ceiling=1.0)
        working = admission.enter(1.0, "normal", NO_DEADLINE)
        await working.__aenter__()
        cancelled, next_one = (asyncio.create_task(hold(admission, 1.0)) for _ in range(2))
        await asyncio.sleep(0.5)
        cancelled.cancel()
        await working.__aexit__(None, None, None)
        assert await next_one == pytest.approx(0.5)
        assert cancelled.cancelled()
        assert (admission.waiting, admission.in_flight) == (0, 0.0)

    run_virtually(main)


def test_what_comes_last_counts_when_it_begins() -> None:
    """Work is let in by its first part's cost; once the rest is charged it may be over the limit, and others wait for its end."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=10.0, ceiling=10.0)

        async def one(begins_s: float) -> float:
            async with admission.enter(8.0, "normal", NO_DEADLINE, first=2.0) as admitted:
                await asyncio.sleep(begins_s)
                admitted.charge()
                await asyncio.sleep(1.0)
                return admitted.waited_s

        tasks = [asyncio.create_task(one(begins_s)) for begins_s in (0.5, 0.5, 3.0)]
        await asyncio.sleep(0.25)
        assert admission.in_flight == 6.0
        await asyncio.sleep(0.5)
        assert admission.in_flight == 18.0
        assert await hold(admission, 1.0) == pytest.approx(0.75)
        assert [await task for task in tasks] == [0.0, 0.0, 0.0]
        assert (admission.waiting, admission.in_flight) == (0, 0.0)

    run_virtually(main)


def test_work_that_costs_more_than_the_limit_runs_alone() -> None:
    """It waits until nothing is under way, and then is let in whatever it costs."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=2.0, ceiling=2.0)
        small = asyncio.create_task(hold(admission, 1.0))
        await asyncio.sleep(0)
        assert await hold(admission, 50.0) == pytest.approx(1.0)
        await small

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


def test_state_and_shed_requests_are_in_the_metrics() -> None:
    """Limit, work under way, waiting and pressure are gauges; who was turned away is counted by priority from 0 on."""

    async def main(_loop: VirtualLoop) -> None:
        metrics = Metrics("search")
        admission = open_admission("searches", metrics, ceiling=3.0, max_waiting=0)
        async with admission.enter(3.0, "normal", NO_DEADLINE):
            with pytest.raises(Overloaded):
                async with admission.enter(1.0, "high", NO_DEADLINE):
                    pass
            text = generate_latest(metrics.registry).decode()
        for line in (
            "tercet_admission_limit 3.0",
            "tercet_admission_in_flight 3.0",
            "tercet_admission_waiting 0.0",
            "tercet_admission_pressure 1.0",
            'tercet_shed_total{priority="high"} 1.0',
            'tercet_shed_total{priority="low"} 0.0',
        ):
            assert line in text

    run_virtually(main)


def test_a_floor_above_the_ceiling_is_refused() -> None:
    """The limit must have somewhere to be."""

    async def main(loop: VirtualLoop) -> None:
        for floor, ceiling in ((2.0, 1.0), (0.0, 1.0)):
            with pytest.raises(ValueError, match="floor"):
                admission_of(loop, floor=floor, ceiling=ceiling)

    run_virtually(main)


def test_an_endless_deadline_waits_for_a_while_only() -> None:
    """Who would wait for ever is refused after a time in which his turn should have come."""

    async def main(loop: VirtualLoop) -> None:
        admission = admission_of(loop, floor=1.0, ceiling=1.0)
        endless = asyncio.create_task(hold(admission, 1.0, seconds=10_000))
        await asyncio.sleep(0)
        began = loop.time()
        with pytest.raises(Overloaded):
            await hold(admission, 1.0)
        assert loop.time() - began <= 60
        endless.cancel()

    run_virtually(main)
