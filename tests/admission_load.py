"""Load on an `Admission` in virtual time: an open loop of requests, a server of known capacity, and what became of them."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.common.admission import Admission
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, Overloaded
from services.common.wire.search import Priority
from tests.virtual_time import VirtualLoop

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
