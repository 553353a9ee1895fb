"""Calls to many shards side by side: what they said in time, what failed, and the tasks that are still under way."""

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, InvalidInput, NotFound
from services.search.shards.asking import describe
from services.search.shards.calling import Paused

T = TypeVar("T")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gathered(Generic[T]):
    """
    What shards said, by number: the answers, why some failed, and which have not answered in time.

    *paused* are those of the failures that nobody was asked for.
    """

    answers: Mapping[int, T]
    failures: Mapping[int, str]
    late: frozenset[int]
    paused: frozenset[int] = frozenset()


class Gatherer:
    """Runs calls and holds on to those that nobody waits for any more, until they end or it is closed."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Hold on to *task* until it is done, and to what it raises if nobody asks; return it."""
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def side_by_side(self, calls: Mapping[int, Coroutine[Any, Any, T]], deadline: Deadline) -> Gathered[T]:
        """
        Run *calls* until *deadline*: what is late is left to finish, what a cancelled caller asked is cancelled.

        Raises:
            InvalidInput, NotFound: A shard says that the caller is at fault.
        """
        tasks = {number: self.keep(asyncio.create_task(call)) for number, call in calls.items()}
        remaining_s = deadline.remaining_s()
        try:
            if tasks:
                timeout_s = None if remaining_s == float("inf") else max(0.0, remaining_s)
                await asyncio.wait(tasks.values(), timeout=timeout_s)
        except asyncio.CancelledError:
            for task in tasks.values():
                task.cancel()
            raise
        sorting: _Sorting[T] = _Sorting()
        for number, task in tasks.items():
            if not task.done():
                sorting.late.add(number)
            elif task.cancelled():
                sorting.failures[number] = "it was cancelled"
            elif (error := task.exception()) is not None:
                sorting.failed(number, error)
            else:
                sorting.answers[number] = task.result()
        return sorting.done()

    async def one_by_one(self, calls: Mapping[int, Coroutine[Any, Any, T]]) -> Gathered[T]:
        """Run *calls* one after the other, without tasks: for those that take microseconds. Raises as `side_by_side`."""
        sorting: _Sorting[T] = _Sorting()
        waiting = dict(calls)
        try:
            while waiting:
                number, call = waiting.popitem()
                try:
                    sorting.answers[number] = await call
                except Exception as error:
                    sorting.failed(number, error)
        finally:
            for call in waiting.values():
                call.close()
        return sorting.done()

    async def aclose(self) -> None:
        """Cancel what is under way, and wait for its end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("shard_call_failed", error=repr(error))


class _Sorting(Generic[T]):
    """Sorts outcomes into those of Gathered."""

    def __init__(self) -> None:
        self.answers: dict[int, T] = {}
        self.failures: dict[int, str] = {}
        self.late: set[int] = set()
        self.paused: set[int] = set()

    def failed(self, number: int, error: BaseException) -> None:
        if isinstance(error, InvalidInput | NotFound):
            raise error
        if isinstance(error, DeadlineExceeded):
            self.late.add(number)
            return
        self.failures[number] = describe(error)
        if isinstance(error, Paused):
            self.paused.add(number)

    def done(self) -> Gathered[T]:
        return Gathered(self.answers, self.failures, frozenset(self.late), frozenset(self.paused))
