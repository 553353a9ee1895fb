"""
Admission: how much work is under way at once, who waits for his turn, and who is told at once that it would be in vain.

Work is let in up to a limit that follows how long it takes (`adaptive_limit.py`), counted in units of its estimated cost.
What finds the limit used up waits, high priority first, and is turned away with Overloaded where the wait as measured
would outlast its deadline. Under long overload waits are kept short, since who waited long has no time left for the work.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, get_args

from services.common.adaptive_limit import AdaptiveLimit, Load
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, Overloaded
from services.common.metrics import Metrics
from services.common.shedding import Doorway
from services.common.wire.search import Priority

PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)  # Highest first.
START: Final = 128.0
FLOOR: Final = (
    16.0  # So little at once never keeps a service from its full rate by much, nor a caller waiting for long.
)
TICK_S: Final = 0.05
WAIT_SHARE: Final = 0.5  # Share of the time left that may be spent waiting …
OVERLOADED_WAIT_SHARE: Final = 0.15  # … and when callers have been turned away for OVERLOADED_AFTER_S.
OVERLOADED_AFTER_S: Final = 1.0
RECENTLY_S: Final = 1.0
LONGEST_WAIT_S: Final = 60.0
IDLE_INSIDE: Final = 2
PRESSURE_FROM_S: Final = 0.05  # A wait that is no pressure yet, and one that is as much as there can be.
PRESSURE_FULL_S: Final = 0.5
LEAST_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """
    That work was let in: how long it waited, and the pressure (0 none, 1 others are turned away) at that moment.

    *charge* is to be called when the part begins that its first cost left out.
    """

    waited_s: float
    pressure: float
    charge: Callable[[], None] = lambda: None


class Admission:
    """
    Lets work in, up to a limit between *floor* and *ceiling* units of cost; at most *max_waiting* wait.

    It lives in one event loop. *clock* is that of the deadlines; *note_shed* is told of each that is turned away.
    """

    def __init__(
        self,
        name: str,
        *,
        floor: float = 2.0,
        ceiling: float = 1024.0,
        max_waiting: int = 512,
        clock: Callable[[], float] = time.monotonic,
        note_shed: Callable[[Priority], None] = lambda _priority: None,
    ) -> None:
        self.name = name
        self._clock = clock
        self._note_shed = note_shed
        self._max_waiting = max_waiting
        self._adaptive = AdaptiveLimit(floor=floor, ceiling=ceiling, start=START, now=clock())
        self._doorway = Doorway()
        self._queues: dict[Priority, OrderedDict[_Entry, None]] = {priority: OrderedDict() for priority in PRIORITIES}
        self._waiting_cost: dict[Priority, float] = dict.fromkeys(PRIORITIES, 0.0)
        self._inside = 0
        self._in_flight = 0.0
        self._tick_due: float | None = None
        self._looked = clock()
        self._shed_since = self._shed_last = self._refused_last = float("-inf")

    @property
    def limit(self) -> float:
        """The units of cost that may be under way at once now."""
        return self._adaptive.limit

    @property
    def in_flight(self) -> float:
        """The units of cost under way."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def pressure(self) -> float:
        """0: nobody waits for long; 1: others are turned away, or the wait is half a second."""
        if self._clock() - self._shed_last < RECENTLY_S:
            return 1.0
        wait_s = self._adaptive.expected_wait_s(sum(self._waiting_cost.values()))
        return min(1.0, max(0.0, (wait_s - PRESSURE_FROM_S) / (PRESSURE_FULL_S - PRESSURE_FROM_S)))

    def enter(self, cost: float, priority: Priority, deadline: Deadline, *, first: float | None = None) -> "_Entry":
        """
        Return the context in which the work runs, an async context manager of `Admitted`; leaving it, or being
        cancelled, gives the place back.

        Of its *cost* only *first* counts (None: all of it) until `charge`: a part that comes last, and takes most, keeps
        nobody out while the work waits for something else before that.

        Entering raises:
            Overloaded: The queue is full of what is as urgent, or the wait would outlast the deadline.
            DeadlineExceeded: It had passed already.
        """
        return _Entry(self, cost, cost if first is None else min(first, cost), priority, deadline)

    def visit(self, priority: Priority) -> Callable[[], None]:
        """
        Count a request that has not been read yet; return what to call once it is answered or its caller gone.

        Raises:
            Overloaded: So many are turned away that reading one more would take the time of those let in.
        """
        self._keep_time()
        share, refusing = self._wait_share(), self._clock() - self._refused_last < RECENTLY_S
        if not self._doorway.lets_in(priority, wait_share=share, refusing=refusing):
            raise self._shed(priority)
        self._doorway.enter()
        return self._doorway.leave

    async def admit(self, entry: "_Entry") -> Admitted:
        """Let *entry* in, when it is its turn."""
        now = self._clock()
        self._keep_time()
        remaining_s = min(entry.deadline.at - now, LONGEST_WAIT_S)
        if remaining_s <= 0:
            raise DeadlineExceeded(f"The time allowed for this request ran out before {self.name} could begin")
        self._doorway.note_time_allowed(remaining_s)
        entry.allowed_s = remaining_s
        if self._has_room(entry.charged) and not any(self._queues[other] for other in _as_urgent(entry.priority)):
            self._let_in(entry, now)
            return Admitted(0.0, self.pressure, lambda: self._charge(entry))
        patience_s = self._patience_s(entry, remaining_s)
        if patience_s <= 0 or not self._make_place(entry.priority):
            raise self._turn_away(entry.priority)
        loop = asyncio.get_running_loop()
        entry.turn = loop.create_future()
        timer = loop.call_later(patience_s, self._give_up_on, entry)
        self._queues[entry.priority][entry] = None
        self._waiting_cost[entry.priority] += entry.cost
        try:
            await entry.turn
        except BaseException:
            if entry.began is not None:  # Its turn came in the moment in which it was cancelled.
                self.leave(entry, done=False)
            else:
                self._remove(entry)
            raise
        finally:
            timer.cancel()
        return Admitted(self._clock() - now, self.pressure, lambda: self._charge(entry))

    def leave(self, entry: "_Entry", *, done: bool) -> None:
        """Give the place of *entry* back; what is not *done* failed, or nobody waits for it any more."""
        assert entry.began is not None, "it was let in"
        seconds = self._clock() - entry.began
        if done:
            self._adaptive.ended(entry.charged, seconds, entry.allowed_s)
        else:
            self._adaptive.failed(entry.charged, seconds, entry.allowed_s)
        entry.began = None
        self._inside -= 1
        self._in_flight = self._in_flight - entry.charged if self._inside else 0.0
        self._next()

    def _has_room(self, cost: float) -> bool:
        return self._inside == 0 or self._in_flight + cost <= self._adaptive.limit

    def _let_in(self, entry: "_Entry", now: float) -> None:
        entry.began = now
        self._inside += 1
        self._in_flight += entry.charged

    def _charge(self, entry: "_Entry") -> None:
        if entry.began is not None:
            self._in_flight += entry.cost - entry.charged
            entry.charged = entry.cost

    def _next(self) -> None:
        """Let in those whose turn it is."""
        for queue in self._queues.values():
            while queue:
                entry = next(iter(queue))
                if not self._has_room(entry.charged):
                    return
                self._remove(entry)
                assert entry.turn is not None, "it waits"
                if not entry.turn.done():  # It may have been cancelled a moment ago, and not know it yet.
                    self._let_in(entry, self._clock())
                    entry.turn.set_result(None)

    def _wait_share(self) -> float:
        now = self._clock()
        long_overload = now - self._shed_last < RECENTLY_S and now - self._shed_since > OVERLOADED_AFTER_S
        return OVERLOADED_WAIT_SHARE if long_overload else WAIT_SHARE

    def _patience_s(self, entry: "_Entry", remaining_s: float) -> float:
        """Return how long *entry* may wait; 0 where it would not get its turn in that time."""
        ahead = entry.cost + sum(self._waiting_cost[urgent] for urgent in _as_urgent(entry.priority))
        patience_s = min(self._wait_share() * remaining_s, remaining_s - self._adaptive.usual_s(entry.cost))
        return patience_s if self._adaptive.expected_wait_s(ahead) <= patience_s else 0.0

    def _make_place(self, priority: Priority) -> bool:
        """Return whether one more of *priority* may wait, turning away the newest of the least urgent if need be."""
        if self.waiting < self._max_waiting:
            return True
        for other in reversed(PRIORITIES):
            if other == priority:
                return False
            if self._queues[other]:
                self._give_up_on(next(reversed(self._queues[other])))
                return True
        return False

    def _give_up_on(self, entry: "_Entry") -> None:
        if entry in self._queues[entry.priority]:
            self._remove(entry)
            assert entry.turn is not None, "it waits"
            if not entry.turn.done():
                entry.turn.set_exception(self._turn_away(entry.priority))

    def _remove(self, entry: "_Entry") -> None:
        queue = self._queues[entry.priority]
        if entry in queue:
            del queue[entry]
            left = self._waiting_cost[entry.priority] - entry.cost
            self._waiting_cost[entry.priority] = left if queue else 0.0

    def _turn_away(self, priority: Priority) -> Overloaded:
        self._refused_last = self._clock()
        self._doorway.refused()
        return self._shed(priority)

    def _shed(self, priority: Priority) -> Overloaded:
        now = self._clock()
        if now - self._shed_last > RECENTLY_S:
            self._shed_since = now
        self._shed_last = now
        self._note_shed(priority)
        wait_s = self._adaptive.expected_wait_s(sum(self._waiting_cost.values()))
        return Overloaded(
            f"Too many {self.name} at once; try again later, or allow more time",
            retry_after_s=max(LEAST_RETRY_S, wait_s),
        )

    def _keep_time(self) -> None:
        """See to it that the limit is looked at while there is anything to see."""
        if self._tick_due is None:
            self._tick_due = self._clock() + TICK_S
            asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        assert self._tick_due is not None, "it was asked for"
        now = self._clock()
        waiting = self.waiting
        used_up = waiting > 0 or self._in_flight >= 0.8 * self._adaptive.limit
        self._doorway.look(elapsed_s=max(TICK_S, now - self._looked), lag_s=max(0.0, now - self._tick_due))
        self._looked = now
        load = Load(used_up, waiting > 0, self._inside <= IDLE_INSIDE, self._doorway.keeps_up)
        self._adaptive.look(now, load)
        self._next()
        self._tick_due = None
        if self._inside or waiting or self._doorway.inside:
            self._keep_time()


class _Entry:
    """
    One piece of work: waiting, under way, or done with.

    *charged* is what counts of its cost so far, and *allowed_s* the time that it had when it came.
    """

    __slots__ = ("_admission", "allowed_s", "began", "charged", "cost", "deadline", "priority", "turn")

    def __init__(self, admission: Admission, cost: float, first: float, priority: Priority, deadline: Deadline) -> None:
        self._admission = admission
        self.cost = cost
        self.charged = first
        self.priority: Priority = priority
        self.deadline = deadline
        self.allowed_s = LONGEST_WAIT_S
        self.began: float | None = None
        self.turn: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Admitted:
        return await self._admission.admit(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._admission.leave(self, done=kind is None)


def _as_urgent(priority: Priority) -> tuple[Priority, ...]:
    return PRIORITIES[: PRIORITIES.index(priority) + 1]


def open_admission(name: str, metrics: Metrics, *, ceiling: float, max_waiting: int) -> Admission:
    """Return an `Admission` for *name* (a plural, which stands in its errors) whose state is in *metrics*."""
    shed = metrics.counter(
        "tercet_shed_total", "Requests turned away since there was too much to do.", ("priority",), PRIORITIES
    )
    admission = Admission(
        name,
        floor=min(FLOOR, ceiling),
        ceiling=ceiling,
        max_waiting=max_waiting,
        note_shed=lambda priority: shed.labels(priority).inc(),
    )
    metrics.gauge("tercet_admission_limit", "Work that may be under way at once, by cost.", lambda: admission.limit)
    metrics.gauge("tercet_admission_in_flight", "Work under way, by cost.", lambda: admission.in_flight)
    metrics.gauge("tercet_admission_waiting", "Requests that wait for their turn.", lambda: admission.waiting)
    metrics.gauge("tercet_admission_pressure", "0: none; 1: requests are turned away.", lambda: admission.pressure)
    return admission
