"""Asking one shard: its replicas one after the other, within the deadline, and at last the fallback index."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, NotFound, TercetError
from services.search.ports import Collection, ShardAnswer, ShardHost, ShardQuery
from services.search.shards.replicas import Key, Placement, Replica, in_order

T = TypeVar("T")

Call = Callable[[ShardHost, Deadline], Awaitable[T]]
Keep = Callable[[asyncio.Task[Any]], asyncio.Task[Any]]

SHARE = 0.5  # of the time left, for a replica while there is another to ask after it
FAIR_TIME_S = 0.25  # A host that was given less and was late is not to blame: one hasty caller must not put it aside.
LATECOMERS_S = 5.0  # how long the replicas that were not first to apply an operation are waited for

_log = structlog.get_logger(__name__)


def describe(error: BaseException) -> str:
    """Return what a caller may read about *error*; the log has the rest."""
    return error.message if isinstance(error, TercetError) else type(error).__name__


class Asker:
    """Knows what every host of *placement* is worth for every shard, and asks the best of them."""

    def __init__(
        self, placement: Placement, *, note_failure: Callable[[str], None], note_fallback: Callable[[], None]
    ) -> None:
        self._placement = placement
        self._note_failure = note_failure
        self._note_fallback = note_fallback
        self._promised: dict[str, int] = {}

    def forget(self, uuid: str) -> None:
        """Drop what is known of a collection."""
        self._promised.pop(uuid, None)

    async def ask(self, collection: Collection, shard: int, call: Call[T], deadline: Deadline) -> T:
        """
        Return what the first host answers that can.

        Raises:
            InvalidInput, NotFound: The call is at fault.
            TercetError: What the last host raised, as none could answer.
        """
        key = (collection.uuid, shard)
        options = self._options(key)
        failure: Exception | None = None
        for position, option in enumerate(options):
            try:
                return await self._try(option, key, call, deadline, more=position + 1 < len(options))
            except (InvalidInput, NotFound):
                raise
            except Exception as error:
                failure = error
                if deadline.passed:
                    break
        assert failure is not None
        raise failure

    async def search(self, collection: Collection, shard: int, query: ShardQuery, deadline: Deadline) -> ShardAnswer:
        """Return a shard's answer as `ask` does, of a replica that is caught up where there is one."""

        def call(host: ShardHost, until: Deadline) -> Awaitable[ShardAnswer]:
            return host.search(collection, shard, query, until)

        key = (collection.uuid, shard)
        options = self._options(key)
        reserve: ShardAnswer | None = None
        failure: Exception | None = None
        for position, option in enumerate(options):
            if reserve is not None and not self._better(option, key):
                break
            try:
                answer = await self._try(option, key, call, deadline, more=position + 1 < len(options))
            except (InvalidInput, NotFound):
                raise
            except Exception as error:
                failure = error
                if deadline.passed:
                    break
                continue
            if option is self._placement.fallback:
                self._note_fallback()
                return replace(answer, fallback=True)
            behind = answer.catching_up or answer.applied_seq < self._promised.get(collection.uuid, 0)
            option.stands_at(key, answer.applied_seq, behind=behind)
            if not behind:
                return answer
            if reserve is None or reserve.applied_seq < answer.applied_seq:
                reserve = answer
        if reserve is not None:
            return reserve
        assert failure is not None
        raise failure

    async def wait_applied(self, collection: Collection, shard: int, seq: int, deadline: Deadline, keep: Keep) -> bool:
        """Wait until a replica has applied *seq*; the others are still waited for a while, to know when they have."""
        key = (collection.uuid, shard)
        replicas = self._placement.replicas(shard)
        if len(replicas) == 1:
            applied = await self._wait(replicas[0], collection, key, seq, deadline)
            if applied:
                self._promise(collection, seq)
            return applied
        waiting = {
            keep(asyncio.create_task(self._wait(replica, collection, key, seq, deadline))) for replica in replicas
        }
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if any(not task.cancelled() and task.exception() is None and task.result() for task in done):
                    self._promise(collection, seq)
                    self._note_others(replicas, key, seq)
                    for task in waiting:
                        asyncio.get_running_loop().call_later(LATECOMERS_S, task.cancel)
                    return True
        except asyncio.CancelledError:
            for task in waiting:
                task.cancel()
            raise
        return False

    def _note_others(self, replicas: Sequence[Replica], key: Key, seq: int) -> None:
        """Let searches go to the replicas that have applied *seq*, until the others have, or a while has passed."""
        for replica in replicas:
            reached = replica.applied.get(key, 0)
            if reached < seq:
                replica.stands_at(key, reached, behind=True)

    async def _wait(self, replica: Replica, collection: Collection, key: Key, seq: int, deadline: Deadline) -> bool:
        try:
            applied = await replica.host.wait_applied(collection, key[1], seq, deadline)
        except (InvalidInput, NotFound):
            raise
        except Exception as error:
            self._note(replica, key, error, FAIR_TIME_S)
            raise
        if applied:
            replica.stands_at(key, max(seq, replica.applied.get(key, 0)), behind=False)
        return applied

    def _promise(self, collection: Collection, seq: int) -> None:
        self._promised[collection.uuid] = max(seq, self._promised.get(collection.uuid, 0))

    def _options(self, key: Key) -> list[Replica]:
        return in_order(self._placement.replicas(key[1]), key, self._placement.fallback)

    def _better(self, option: Replica, key: Key) -> bool:
        """Whether *option* may be further than a replica that answered and is behind: none that is known not to be."""
        aside = option.aside_until(key) > asyncio.get_running_loop().time()
        return option is not self._placement.fallback and not aside and not option.behind(key)

    async def _try(self, option: Replica, key: Key, call: Call[T], deadline: Deadline, *, more: bool) -> T:
        given_s = deadline.remaining_s()
        try:
            with option.calling(key):
                if not more or given_s == float("inf"):
                    return await call(option.host, deadline)
                given_s *= SHARE
                async with asyncio.timeout(max(0.0, given_s)):
                    return await call(option.host, deadline.at_most(given_s))
        except (InvalidInput, NotFound):
            option.answered(key)
            raise
        except TimeoutError:
            late = DeadlineExceeded(f"{option.host.name} did not answer in time")
            self._note(option, key, late, given_s)
            raise late from None
        except Exception as error:
            self._note(option, key, error, given_s)
            raise

    def _note(self, option: Replica, key: Key, error: Exception, given_s: float) -> None:
        if isinstance(error, DeadlineExceeded) and given_s < FAIR_TIME_S:
            return
        whole = not option.local and isinstance(error, DependencyUnavailable | DeadlineExceeded)
        option.failed(key, whole=whole)
        self._note_failure(option.host.name)
        _log.warning("shard_host_failed", host=option.host.name, shard=key[1], whole=whole, error=repr(error))
