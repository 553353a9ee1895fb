"""Single flight: what many want at the same time is made once, in a task that no caller's end takes along."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")

# Callers whose deadlines are closer than this have the same time, for what is made with it.
LEEWAY_S = 0.1


class _Flight(Generic[T]):
    def __init__(self, number: int, deadline: Deadline) -> None:
        self.number = number
        self.deadline = deadline
        self.waiting = 0
        self.task: asyncio.Task[T]


class Flights(Generic[T]):
    """
    Flights under way, by key.

    A flight has the time of the caller that began it, its leader. When a caller is cancelled the flight goes on for the
    others; when the last one is, it is cancelled.
    """

    def __init__(self, *, joined: Callable[[], None] = lambda: None) -> None:
        """Call *joined* whenever a caller shares what another one's flight made."""
        self._flights: dict[Hashable, _Flight[T]] = {}
        self._begun = 0
        self._joined = joined

    async def once(
        self,
        key: Hashable,
        deadline: Deadline,
        make: Callable[[], Awaitable[T]],
        *,
        good: Callable[[T, bool, bool], Awaitable[bool]],
    ) -> T:
        """
        Return what *make* returns, or what it returned to another caller for the same *key*.

        *good* is asked whether another caller's result serves this one, with whether its flight began before this one
        asked (so that it may be older), and whether it had less time; if not, or where the leader failed for want of
        time or room, this caller asks again, or leads. Who has much less time than the leader makes it for himself.

        Raises:
            DeadlineExceeded: *deadline* came while another caller's flight was under way.
            Exception: What *make* raised, here or for another caller.
        """
        asked = self._begun
        while True:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._begin(key, deadline, make)
            elif flight.deadline.at > deadline.at + LEEWAY_S:
                return await make()
            try:
                found = await self._wait(key, flight, NO_DEADLINE if leads else deadline)
            except _Lost:
                continue
            except (DeadlineExceeded, Overloaded):
                if leads or deadline.passed:
                    raise
                continue
            if leads:
                return found
            hurried = flight.deadline.at < deadline.at - LEEWAY_S
            if await good(found, flight.number <= asked, hurried):
                self._joined()
                return found

    @property
    def under_way(self) -> int:
        """How many there are that others may join."""
        return len(self._flights)

    def _begin(self, key: Hashable, deadline: Deadline, make: Callable[[], Awaitable[T]]) -> _Flight[T]:
        self._begun += 1
        flight: _Flight[T] = _Flight(self._begun, deadline)
        flight.task = asyncio.create_task(self._fly(key, flight, make))
        flight.task.add_done_callback(_look_at)
        self._flights[key] = flight
        return flight

    async def _fly(self, key: Hashable, flight: _Flight[T], make: Callable[[], Awaitable[T]]) -> T:
        try:
            return await make()
        finally:
            self._land(key, flight)

    def _land(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _wait(self, key: Hashable, flight: _Flight[T], deadline: Deadline) -> T:
        flight.waiting += 1
        timeout_s = max(0.0, deadline.remaining_s())
        try:
            await asyncio.wait({flight.task}, timeout=None if timeout_s == math.inf else timeout_s)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._land(key, flight)
        if not flight.task.done():
            raise DeadlineExceeded("The time allowed for this request ran out while another made the same answer")
        if flight.task.cancelled():
            raise _Lost
        return flight.task.result()


class _Lost(Exception):
    """The flight was cancelled, and its callers were not."""


def _look_at(task: "asyncio.Task[Any]") -> None:
    """Take note of how *task* ended: whoever waited has seen it, and all may have left."""
    if not task.cancelled():
        task.exception()
