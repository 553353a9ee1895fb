"""All shards of all collections, wherever they are: each question goes to one host of every shard, side by side."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import structlog

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, NotFound, NotReady
from services.search.ports import (
    AuditReport,
    Candidate,
    Collection,
    LexicalStatistics,
    Match,
    RetrievalQuery,
    Retrieved,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards.asking import Asker, describe
from services.search.shards.replicas import Placement, Replica

T = TypeVar("T")

STATISTICS_SHARE = 0.25  # of the time left: a shard that hangs must not use up the search's time
MAX_QUERY_TERMS = 512  # Of a longer question the first words count: each costs a list to read in every shard.
STANDING_PATIENCE_S = 1.0

_log = structlog.get_logger(__name__)


class Analyze(Protocol):
    """Turns a question into the terms that the shards know."""

    def __call__(self, text: str, language: str, *, stop_words: bool) -> Sequence[str]:
        """Return the analysed words of *text*, without the language's commonest unless *stop_words*."""
        ...


@dataclass(frozen=True, slots=True)
class _Gathered(Generic[T]):
    """What shards said, by number: the answers, why some failed, and which have not answered in time."""

    answers: Mapping[int, T]
    failures: Mapping[int, str]
    late: frozenset[int]


class ShardRouter:
    """
    The `Retriever` port over the hosts of a placement.

    Of a shard's replicas one is asked that is well, caught up and has the least to do; where it fails the others are,
    then the fallback index. After a `wait_applied` searches prefer replicas that have applied that operation.
    """

    def __init__(
        self,
        placement: Placement,
        analyze: Analyze,
        *,
        note_failure: Callable[[str], None] = lambda _: None,
        note_fallback: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask the hosts of *placement*, which are not closed by this; *note_failure* is told the name of one that failed."""
        self._placement = placement
        self._analyze = analyze
        self._asker = Asker(placement, note_failure=note_failure, note_fallback=note_fallback)
        self._asking: set[asyncio.Task[Any]] = set()
        self._closed = False

    # --- reading

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        """
        Ask all shards side by side; those that fail or are late are reported, not raised.

        Raises:
            InvalidInput: A shard refused the query itself.
            NotFound: The collection was deleted.
        """
        self._check_open()
        timings_ms: dict[str, float] = {}
        terms: Sequence[str] = ()
        statistics: LexicalStatistics | None = None
        refused: Mapping[int, str] = {}
        if query.text is not None:
            began = time.perf_counter()
            words = self._analyze(query.text, collection.language, stop_words=query.stop_words)
            terms = words[:MAX_QUERY_TERMS]
            statistics, refused = await self._statistics(collection, sorted(set(terms)), deadline)
            timings_ms["statistics"] = (time.perf_counter() - began) * 1000
        question = ShardQuery(
            limit=query.limit,
            vector=query.vector,
            terms=terms,
            statistics=statistics,
            filter=query.filter,
            match=query.match,
            prefix=query.prefix,
            exact=query.exact,
            explain=query.explain,
            facets=query.facets,
        )
        gathered = await self._gather(
            {
                shard: self._asker.search(collection, shard, question, deadline)
                for shard in range(collection.shards)
                if shard not in refused
            },
            deadline,
        )
        merged = _merge(collection, query, gathered, refused, timings_ms)
        return replace(merged, terms=terms, statistics=statistics)

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        """Return the stored fields of *candidates* by id; those that are gone, or whose shard fails, are missing."""
        self._check_open()
        ids: dict[int, list[str]] = {}
        for candidate in candidates:
            ids.setdefault(candidate.shard, []).append(candidate.id)
        gathered = await self._gather(
            {
                shard: self._asker.ask(
                    collection,
                    shard,
                    lambda host, until, shard=shard, wanted=wanted: host.fetch(  # type: ignore[misc]
                        collection, shard, wanted, until, vectors=vectors
                    ),
                    deadline,
                )
                for shard, wanted in ids.items()
            },
            deadline,
        )
        found: dict[str, ShardDocument] = {}
        for documents in gathered.answers.values():
            found.update(documents)
        return found

    async def matching(self, collection: Collection, filter: Any, deadline: Deadline, *, limit: int) -> list[Match]:
        """See Retriever. The order is that of the shards' numbers, and in each its own."""
        self._check_open()
        gathered = await self._gather(
            {
                shard: self._asker.ask(
                    collection,
                    shard,
                    lambda host, until, shard=shard: host.matching(  # type: ignore[misc]
                        collection, shard, filter, until, limit=limit
                    ),
                    deadline,
                )
                for shard in range(collection.shards)
            },
            deadline,
        )
        if gathered.failures:
            shard, failure = min(gathered.failures.items())
            raise DependencyUnavailable(f"Shard {shard} of {collection.name!r} did not answer: {failure}")
        if gathered.late:
            raise DeadlineExceeded(f"Shard {min(gathered.late)} of {collection.name!r} did not answer in time")
        return [match for _, matches in sorted(gathered.answers.items()) for match in matches][:limit]

    # --- how far the shards are

    def notify(self, collection: Collection, seq: int) -> None:
        """See Retriever."""
        if self._closed:
            return
        for replica in self._placement.everyone():
            replica.host.notify(collection, seq)

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        """See Retriever. False too where no replica of a shard could say."""
        self._check_open()
        gathered = await self._gather(
            {
                shard: self._asker.wait_applied(collection, shard, seq, deadline, self._keep)
                for shard in range(collection.shards)
            },
            deadline,
        )
        return len(gathered.answers) == collection.shards and all(gathered.answers.values())

    async def applied_seq(self, collection: Collection) -> int:
        """Return the lowest `applied_seq` of the collection's shards, each by its best replica; 0 where none answers."""
        deadline = Deadline.after(STANDING_PATIENCE_S)
        best = dict.fromkeys(range(collection.shards), 0)
        for standings in (await self._standings(collection, deadline, fallback=False)).values():
            for standing in standings:
                best[standing.shard] = max(best.get(standing.shard, 0), standing.applied_seq)
        return min(best.values(), default=0)

    async def standings(self, collection: Collection, deadline: Deadline) -> Mapping[str, Sequence[ShardStanding]]:
        """See Retriever. The fallback index is among the hosts."""
        return await self._standings(collection, deadline, fallback=True)

    async def _standings(
        self, collection: Collection, deadline: Deadline, *, fallback: bool
    ) -> dict[str, list[ShardStanding]]:
        everyone = [
            replica for replica in self._placement.everyone() if fallback or replica is not self._placement.fallback
        ]
        calls = {index: replica.host.standings(collection, deadline) for index, replica in enumerate(everyone)}
        gathered = await self._gather(calls, deadline)
        return {everyone[index].host.name: standings for index, standings in gathered.answers.items()}

    # --- orders to all hosts

    async def audit(
        self, collection: Collection, deadline: Deadline, *, repair: bool
    ) -> Mapping[str, Sequence[AuditReport]]:
        """See Retriever. A shard on a host that does not answer (in time) is missing."""
        return await self._on_every_host(
            collection, lambda host, shard: host.audit(collection, shard, deadline, repair=repair), deadline
        )

    async def snapshot(self, collection: Collection, deadline: Deadline) -> Mapping[str, Mapping[int, int]]:
        """See Retriever. A shard on a host that does not answer (in time) is missing."""

        async def numbered(replica: Replica, shard: int) -> tuple[int, int]:
            return shard, await replica.host.snapshot(collection, shard, deadline)

        made = await self._on_every_host(collection, lambda host, shard: numbered(Replica(host), shard), deadline)
        return {name: dict(pairs) for name, pairs in made.items()}

    async def forget(self, collection: Collection) -> None:
        """See Retriever. A host that does not answer finds out by itself."""
        for replica in self._placement.everyone():
            replica.forget(collection.uuid)
        self._asker.forget(collection.uuid)
        forgetting = [replica.host.forget(collection) for replica in self._placement.everyone()]
        for outcome in await asyncio.gather(*forgetting, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.warning("host_did_not_forget", collection=collection.name, error=repr(outcome))

    async def aclose(self) -> None:
        """Drop late answers; the hosts stay open. Closing twice does no harm."""
        self._closed = True
        asking = list(self._asking)
        for task in asking:
            task.cancel()
        if asking:
            await asyncio.wait(asking)

    # --- asking

    async def _statistics(
        self, collection: Collection, terms: Sequence[str], deadline: Deadline
    ) -> tuple[LexicalStatistics, Mapping[int, str]]:
        """Return the statistics of all shards that gave them in time, and why others failed."""
        remaining_s = deadline.remaining_s()
        until = deadline if remaining_s == float("inf") else Deadline.after(remaining_s * STATISTICS_SHARE)
        calls = {
            shard: self._asker.ask(
                collection,
                shard,
                lambda host, until, shard=shard: host.statistics(collection, shard, terms, until),  # type: ignore[misc]
                until,
            )
            for shard in range(collection.shards)
        }
        if all(replica.local for replica in self._placement.everyone()):
            # Microseconds each, and they do not wait: tasks for them would take longer.
            gathered = await self._one_by_one(calls)
        else:
            gathered = await self._gather(calls, until)
        return sum(gathered.answers.values(), LexicalStatistics(0, {})), gathered.failures

    async def _one_by_one(self, calls: Mapping[int, Coroutine[Any, Any, T]]) -> _Gathered[T]:
        answers: dict[int, T] = {}
        failures: dict[int, str] = {}
        late: set[int] = set()
        waiting = dict(calls)
        try:
            while waiting:
                number, call = waiting.popitem()
                try:
                    answers[number] = await call
                except (InvalidInput, NotFound):
                    raise
                except DeadlineExceeded:
                    late.add(number)
                except Exception as error:
                    failures[number] = describe(error)
        finally:
            for call in waiting.values():
                call.close()
        return _Gathered(answers, failures, frozenset(late))

    async def _gather(self, calls: Mapping[int, Coroutine[Any, Any, T]], deadline: Deadline) -> _Gathered[T]:
        """Run *calls* side by side: what is late is left to finish, what a cancelled caller asked is cancelled."""
        tasks = {number: self._keep(asyncio.create_task(call)) for number, call in calls.items()}
        remaining_s = deadline.remaining_s()
        try:
            if tasks:
                timeout_s = None if remaining_s == float("inf") else max(0.0, remaining_s)
                await asyncio.wait(tasks.values(), timeout=timeout_s)
        except asyncio.CancelledError:
            for task in tasks.values():
                task.cancel()
            raise
        answers: dict[int, T] = {}
        failures: dict[int, str] = {}
        late: set[int] = set()
        for number, task in tasks.items():
            error = None if not task.done() or task.cancelled() else task.exception()
            if isinstance(error, InvalidInput | NotFound):
                raise error
            if not task.done() or isinstance(error, DeadlineExceeded):
                late.add(number)
            elif task.cancelled():
                failures[number] = "it was cancelled"
            elif error is not None:
                failures[number] = describe(error)
            else:
                answers[number] = task.result()
        return _Gathered(answers, failures, frozenset(late))

    async def _on_every_host(
        self, collection: Collection, call: Callable[[Any, int], Coroutine[Any, Any, T]], deadline: Deadline
    ) -> dict[str, list[T]]:
        fallback = self._placement.fallback
        asked = [
            (replica.host, shard)
            for shard in range(collection.shards)
            for replica in [*self._placement.replicas(shard), *([fallback] if fallback is not None else ())]
        ]
        calls = {index: call(host, shard) for index, (host, shard) in enumerate(asked)}
        gathered = await self._gather(calls, deadline)
        answers: dict[str, list[T]] = {}
        for index, answer in sorted(gathered.answers.items()):
            answers.setdefault(asked[index][0].name, []).append(answer)
        return answers

    def _keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._asking.add(task)
        task.add_done_callback(self._asked)
        return task

    def _asked(self, task: asyncio.Task[Any]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("shard_call_failed", error=repr(error))

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady("The shards are closed: the service is shutting down")


def _merge(
    collection: Collection,
    query: RetrievalQuery,
    gathered: _Gathered[ShardAnswer],
    refused: Mapping[int, str],
    timings_ms: dict[str, float],
) -> Retrieved:
    answers = gathered.answers.values()
    for answer in answers:
        for stage, spent in answer.timings_ms.items():
            timings_ms[stage] = max(spent, timings_ms.get(stage, 0.0))
    return Retrieved(
        candidates=[candidate for answer in answers for candidate in answer.candidates],
        total=collection.shards,
        ok=len(answers),
        catching_up=sum(answer.catching_up for answer in answers),
        failures={**refused, **gathered.failures},
        timed_out=len(gathered.late),
        as_of=min((answer.applied_seq for answer in answers), default=0),
        timings_ms=timings_ms,
        fallback=sum(answer.fallback for answer in answers),
        plans={number: answer.plan for number, answer in gathered.answers.items() if answer.plan is not None},
        facets=_facets(query, [answer.facets for answer in answers]) if query.facets else {},
    )


def _facets(query: RetrievalQuery, parts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Add up the shards' counts and return, for each field, the commonest values first, ties by value."""
    merged: dict[str, dict[str, int]] = {}
    for field, limit in query.facets.items():
        counts: dict[str, int] = {}
        for part in parts:
            for value, count in part.get(field, {}).items():
                counts[value] = counts.get(value, 0) + count
        merged[field] = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:limit])
    return merged
