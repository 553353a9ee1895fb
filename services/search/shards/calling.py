"""
One call to a host of shards, or to two of them of which the first to answer counts, and what is learnt from it.

A host in another process is called under its breaker, which hears of what says something about the host as a whole.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import structlog

from services.common.breaker import Breaker, NotAFailure, Unproven
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, NotFound, Overloaded
from services.common.retry_budget import RetryBudget
from services.search.ports import ShardHost
from services.search.shards.replicas import Key, Replica

T = TypeVar("T")

Call = Callable[[ShardHost, Deadline], Awaitable[T]]
Verb = Literal["statistics", "search", "fetch", "matching"]

SHARE = 0.5  # of the time left, for a replica while there is another to ask after it

_BULK: frozenset[Verb] = frozenset({"matching"})  # neither asked of two, nor ever too slow

_log = structlog.get_logger(__name__)


class Keep(Protocol):
    """Holds on to a task until it is done, and to what it raises if nobody asks."""

    def __call__(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Return *task*."""
        ...


class Paused(DependencyUnavailable):
    """Nobody was asked, as the breakers of all hosts that could be are open."""


class _Outrun(Exception):
    """Another host answered before this one, which had been asked earlier."""


@dataclass(frozen=True, slots=True)
class AskingOptions:
    """
    How hosts in other processes are asked, and who hears of it.

    Each gets a breaker of *make_breaker*, by the host's name; a read that took it over *slow_call_s* counts as failed.
    A second host is asked only within *budget*; without one, never. *note_failure* is told the name of a host that
    failed, *note_hedge* whether the second host was first to answer.
    """

    make_breaker: Callable[[str], Breaker] = Breaker
    budget: RetryBudget | None = None
    slow_call_s: float | None = None
    note_failure: Callable[[str], None] = lambda _: None
    note_fallback: Callable[[], None] = lambda: None
    note_lexical_failure: Callable[[], None] = lambda: None
    note_hedge: Callable[[bool], None] = lambda _: None


@dataclass(slots=True, eq=False)
class Question(Generic[T]):
    """One call about one shard: whom it may still go to, and how many it went to."""

    verb: Verb
    key: Key
    call: Call[T]
    deadline: Deadline
    options: list[Replica]
    fallback: Replica | None
    attempts: int = 0
    hedged: bool = False


@dataclass(slots=True, eq=False)
class _Attempt:
    """Whether another host answered meanwhile."""

    outrun: bool = False


class Caller:
    """Calls hosts as *options* say; *keep* holds on to the calls that nobody waits for any more."""

    def __init__(self, options: AskingOptions, keep: Keep) -> None:
        self._with = options
        self._keep = keep

    def equip(self, replica: Replica) -> None:
        """Give a host in another process its breaker, if it has none yet."""
        if not replica.local and replica.breaker is None:
            replica.breaker = self._with.make_breaker(replica.host.name)

    async def ask_next(self, question: Question[T]) -> tuple[Replica, T]:
        """
        Ask the next of the question's hosts, and another replica too if that is slow and the budget allows.

        Return who answered, and what. Raises what the host raised, and Paused where its breaker is open by now.
        """
        option = question.options.pop(0)
        budget = self._with.budget
        if budget is None or option.local or question.verb in _BULK:
            return option, await self._try(option, question)
        if not question.attempts:
            budget.first()
        if option is question.fallback or _second(question) is None:
            return option, await self._try(option, question)
        return await self._race(option, budget, question)

    async def _race(self, option: Replica, budget: RetryBudget, question: Question[T]) -> tuple[Replica, T]:
        attempts: dict[asyncio.Task[T], tuple[Replica, _Attempt]] = {}

        def start(replica: Replica) -> asyncio.Task[T]:
            attempt = _Attempt()
            task = self._keep(asyncio.create_task(self._try(replica, question, attempt)))
            attempts[task] = (replica, attempt)
            return task

        first = start(option)
        waiting = {first}
        try:
            done, _ = await asyncio.wait(waiting, timeout=option.hedge_after_s(question.verb))
            second = None if done else _second(question)
            if second is not None and budget.take():
                question.options.remove(second)
                question.hedged = True
                waiting = {first, start(second)}
            failure: BaseException | None = None
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    failure = None if task.cancelled() else task.exception()
                    if failure is None and not task.cancelled():
                        if question.hedged:
                            self._with.note_hedge(task is not first)
                        # Who was asked later has not been given the time that the other took.
                        if first in waiting:
                            attempts[first][1].outrun = True
                        return attempts[task][0], task.result()
                    if isinstance(failure, InvalidInput | NotFound):
                        raise failure
        finally:
            for task in attempts:
                task.cancel()
        raise failure or DependencyUnavailable(f"The call to {option.host.name} was cancelled")

    # --- one host

    async def _try(self, option: Replica, question: Question[T], attempt: _Attempt | None = None) -> T:
        """Ask one host, for a share of the time if there are others, and learn from it."""
        if option.refuses:  # Another call may have become its breaker's probe meanwhile.
            raise Paused(f"{option.host.name} is not answering; calls to it are paused")
        given_s = question.deadline.remaining_s()
        if question.options and given_s != float("inf"):
            given_s *= SHARE
        question.attempts += 1
        try:
            with option.calling(question.key):
                if option.breaker is None:
                    return await self._within(given_s, option, question)
                return await self._guarded(option.breaker, given_s, option, question, attempt)
        except (InvalidInput, NotFound):
            option.answered(question.key)
            raise
        except _Outrun:
            option.lost()
            raise
        except Exception as error:
            self.note(option, question.key, error, hasty=given_s < option.fair_s(question.verb))
            raise

    async def _guarded(
        self, breaker: Breaker, given_s: float, option: Replica, question: Question[T], attempt: _Attempt | None
    ) -> T:
        """Ask under the host's breaker, which hears of what says something about the host as a whole."""
        began = time.perf_counter()
        broken: Exception | None = None
        try:
            async with breaker.guard(None if question.verb in _BULK else self._with.slow_call_s):
                try:
                    answer = await self._within(given_s, option, question)
                except asyncio.CancelledError:
                    if attempt is None or not attempt.outrun:
                        raise
                    raise _Outrun from None
                except (InvalidInput, NotFound, Overloaded) as error:
                    raise NotAFailure from error
                except DeadlineExceeded as error:
                    if given_s < option.fair_s(question.verb):
                        raise Unproven from error
                    raise
                except DependencyUnavailable:
                    raise
                except Exception as error:
                    broken = error  # It answered: one shard of it is at fault.
        except NotAFailure as outcome:
            raise outcome.__cause__ or outcome from None
        if broken is not None:
            raise broken
        option.took(question.verb, time.perf_counter() - began)
        return answer

    async def _within(self, given_s: float, option: Replica, question: Question[T]) -> T:
        """Call a host; where others are left to ask, for *given_s* only."""
        if not question.options or given_s == float("inf"):
            return await question.call(option.host, question.deadline)
        try:
            async with asyncio.timeout(max(0.0, given_s)):
                return await question.call(option.host, question.deadline.at_most(given_s))
        except TimeoutError:
            raise DeadlineExceeded(f"{option.host.name} did not answer in time") from None

    def note(self, option: Replica, key: Key, error: Exception, *, hasty: bool) -> None:
        """Note that a host failed; *hasty* says that it was given too little time to be to blame for being late."""
        if isinstance(error, Overloaded) or (isinstance(error, DeadlineExceeded) and hasty):
            return
        whole = not option.local and isinstance(error, DependencyUnavailable | DeadlineExceeded)
        option.failed(key, whole=whole)
        self._with.note_failure(option.host.name)
        _log.warning("shard_host_failed", host=option.host.name, shard=key[1], whole=whole, error=repr(error))


def _second(question: Question[T]) -> Replica | None:
    """Return the replica that is asked beside one that is slow: the next that nothing is held against."""
    for option in question.options:
        if not option.local and option is not question.fallback and option.sound(question.key):
            return option
    return None
