"""Admission, in virtual time: who is let in, who waits, who is turned away, and what is said of it."""

import asyncio

import pytest
from prometheus_client import generate_latest

from services.common.admission import Admission, open_admission
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, Overloaded
from services.common.metrics import Metrics
from services.common.wire.search import Priority
from tests.admission_load import admission_of
from tests.virtual_time import VirtualLoop, run_virtually


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
