"""
Asking one shard: its replicas one after the other, within the deadline, and at last the fallback index.

What is known of hosts is in replicas.py, how one is called in calling.py. Where the only host is in this process there
is none of this.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from services.common.deadline import Deadline
from services.common.errors import InvalidInput, NotFound, TercetError
from services.search.ports import Collection, ShardAnswer, ShardCall, ShardHost, ShardQuery
from services.search.shards.calling import AskingOptions, Call, Caller, Keep, Paused, Question, Verb
from services.search.shards.replicas import Key, Placement, Replica, in_order

T = TypeVar("T")

PROBE_PATIENCE_S = 0.5  # how long a shard waits for the one call that tries whether its only hosts are back
LATECOMERS_S = 5.0  # how long the replicas that were not first to apply an operation are waited for


def describe(error: BaseException) -> str:
    """Return what a caller may read about *error*; the log has the rest."""
    return error.message if isinstance(error, TercetError) else type(error).__name__


class Asker:
    """Knows what every host of *placement* is worth for every shard, and asks the best of them."""

    def __init__(self, placement: Placement, options: AskingOptions, keep: Keep) -> None:
        self._placement = placement
        self._with = options
        self._caller = Caller(options, keep)
        self._keep = keep
        for replica in placement.everyone():  # So that their breakers are there to be seen before the first question.
            self._caller.equip(replica)
        self._promised: dict[str, int] = {}

    def forget(self, uuid: str) -> None:
        """Drop what is known of a collection."""
        self._promised.pop(uuid, None)

    def promised(self, uuid: str) -> int:
        """Return the last operation that a replica was waited for to apply, 0 for none."""
        return self._promised.get(uuid, 0)

    async def ask(self, collection: Collection, shard: int, verb: Verb, call: Call[T], deadline: Deadline) -> T:
        """
        Return what the first host answers that can.

        Raises:
            InvalidInput, NotFound: The call is at fault.
            Paused: All hosts' breakers are open.
            TercetError: What the last host raised, as none could answer.
        """
        key = (collection.uuid, shard)
        alone = self._alone(shard)
        if alone is not None:
            return await self._directly(alone, key, call, deadline)
        question = self._question(key, verb, call, deadline)
        return (await self._pursue(question, lambda _option, _answer: None))[1]

    async def search(
        self,
        collection: Collection,
        shard: int,
        query: ShardQuery,
        deadline: Deadline,
        calls: dict[int, ShardCall] | None = None,
    ) -> ShardAnswer:
        """
        Return a shard's answer as `ask` does, of a replica that is whole and caught up where there is one.

        Who answered is noted in *calls*.
        """

        def call(host: ShardHost, until: Deadline) -> Awaitable[ShardAnswer]:
            return host.search(collection, shard, query, until)

        def lacking(option: Replica, answer: ShardAnswer) -> int | None:
            if option is self._placement.fallback:
                return None
            behind = answer.catching_up or answer.applied_seq < self._promised.get(collection.uuid, 0)
            lacks = behind or answer.lexical_failed
            option.stands_at(key, answer.applied_seq, behind=lacks)
            return answer.applied_seq if lacks else None

        began = time.perf_counter()
        key = (collection.uuid, shard)
        attempts, hedged = 1, False
        option = self._alone(shard)
        if option is not None:
            answer = await self._directly(option, key, call, deadline)
        else:
            question = self._question(key, "search", call, deadline)
            option, answer = await self._pursue(question, lacking)
            attempts, hedged = question.attempts, question.hedged
        if calls is not None:
            took_ms = (time.perf_counter() - began) * 1000
            calls[shard] = ShardCall(option.host.name, took_ms, answer.applied_seq, attempts=attempts, hedged=hedged)
        if answer.lexical_failed:
            self._with.note_lexical_failure()
        if option is self._placement.fallback:
            self._with.note_fallback()
            return replace(answer, fallback=True)
        return answer

    # --- the only host, in this process: there is nothing to choose, and nothing to learn but that it failed

    def _alone(self, shard: int) -> Replica | None:
        replicas = self._placement.replicas(shard)
        alone = len(replicas) == 1 and replicas[0].local and self._placement.fallback is None
        return replicas[0] if alone else None

    async def _directly(self, option: Replica, key: Key, call: Call[T], deadline: Deadline) -> T:
        try:
            return await call(option.host, deadline)
        except (InvalidInput, NotFound):
            raise
        except Exception as error:
            self._caller.note(option, key, error, hasty=deadline.passed)
            raise

    # --- one host after the other

    def _question(self, key: Key, verb: Verb, call: Call[T], deadline: Deadline) -> Question[T]:
        replicas, fallback = self._placement.replicas(key[1]), self._placement.fallback
        for replica in replicas if fallback is None else (*replicas, fallback):
            self._caller.equip(replica)
        return Question(verb, key, call, deadline, in_order(replicas, key, fallback), fallback)

    async def _pursue(self, question: Question[T], lacking: Callable[[Replica, T], int | None]) -> tuple[Replica, T]:
        """
        Return the first answer that lacks nothing, and who gave it; else the one that *lacking* values most.

        Hosts that are known to be no better than one that answered are not asked after it.
        """
        best: tuple[int, Replica, T] | None = None
        failure: Exception | None = None
        if not question.options:
            await self._await_probes(question)
        while question.options:
            if best is not None and not self._better(question.options[0], question.key):
                break
            try:
                option, answer = await self._caller.ask_next(question)
            except (InvalidInput, NotFound):
                raise
            except Paused:
                if not question.options and best is None and failure is None and not question.attempts:
                    await self._await_probes(question)
                continue
            except Exception as error:
                failure = error
                if question.deadline.passed:
                    break
                continue
            worth = lacking(option, answer)
            if worth is None:
                return option, answer
            if best is None or best[0] < worth:
                best = (worth, option, answer)
        if best is not None:
            return best[1], best[2]
        raise failure or Paused("No host of it answers; calls to them are paused", retry_after_s=1.0)

    async def _await_probes(self, question: Question[T]) -> None:
        """Where a call finds out now whether one of the shard's hosts is back, wait for it, and say whom to ask after it."""
        replicas, fallback = self._placement.replicas(question.key[1]), question.fallback
        hosts = [*replicas, *([fallback] if fallback is not None else ())]
        probing = [host.breaker for host in hosts if host.breaker is not None and host.breaker.is_probing]
        if probing:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(PROBE_PATIENCE_S, max(0.0, question.deadline.remaining_s() / 2))):
                    for breaker in probing:
                        await breaker.probe_over()
            question.options = in_order(replicas, question.key, fallback)

    def _better(self, option: Replica, key: Key) -> bool:
        """Whether *option* may be further than a replica that answered and is behind: none that is known not to be."""
        aside = option.aside_until(key) > asyncio.get_running_loop().time()
        return option is not self._placement.fallback and not aside and not option.behind(key)

    # --- waiting for an operation

    async def wait_applied(self, collection: Collection, shard: int, seq: int, deadline: Deadline) -> bool:
        """Wait until a replica has applied *seq*; the others are still waited for a while, to know when they have."""
        key = (collection.uuid, shard)
        replicas = self._placement.replicas(shard)
        if len(replicas) == 1:
            applied = await self._wait(replicas[0], collection, key, seq, deadline)
            if applied:
                self._promise(collection, seq)
            return applied
        waiting = {
            self._keep(asyncio.create_task(self._wait(replica, collection, key, seq, deadline))) for replica in replicas
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
            self._caller.note(replica, key, error, hasty=False)
            raise
        if applied:
            replica.stands_at(key, max(seq, replica.applied.get(key, 0)), behind=False)
        return applied

    def _promise(self, collection: Collection, seq: int) -> None:
        self._promised[collection.uuid] = max(seq, self._promised.get(collection.uuid, 0))
