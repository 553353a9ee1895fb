"""All shards of all collections, wherever they are: each question goes to one host of every shard, side by side."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import structlog

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, NotReady
from services.search.ports import (
    AuditReport,
    Candidate,
    Collection,
    Fetched,
    Match,
    RetrievalQuery,
    Retrieved,
    ShardAnswer,
    ShardCall,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards.asking import Asker
from services.search.shards.calling import AskingOptions
from services.search.shards.gathering import Gathered, Gatherer
from services.search.shards.merging import NOTHING, Counted, add_up, is_whole, merged, stands
from services.search.shards.replicas import Placement, Replica
from services.search.shards.term_statistics import TermStatistics

T = TypeVar("T")

STATISTICS_SHARE = 0.5  # of the time left: a shard that hangs must not use up the search's time
MAX_QUERY_TERMS = 512  # Of a longer question the first words count: each costs a list to read in every shard.
STANDING_PATIENCE_S = 1.0

_log = structlog.get_logger(__name__)


class Analyze(Protocol):
    """Turns a question into the terms that the shards know."""

    def __call__(self, text: str, language: str, *, stop_words: bool) -> Sequence[str]:
        """Return the analysed words of *text*, without the language's commonest unless *stop_words*."""
        ...


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
        options: AskingOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask the hosts of *placement*, which are not closed by this, as *options* say."""
        self._placement = placement
        self._analyze = analyze
        self._calls = Gatherer()
        self._asker = Asker(placement, options or AskingOptions(), self._calls.keep)
        self._terms = TermStatistics(clock)
        self._closed = False

    # --- reading

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        """
        Ask all shards side by side; those that fail or are late are reported, not raised.

        A question's words take two rounds, the first to count them, unless they were counted lately. A shard that fails
        or is late in the first is not asked in the second, so that it does not use up the others' time.

        Raises:
            InvalidInput: A shard refused the query itself.
            NotFound: The collection was deleted.
        """
        self._check_open()
        calls: dict[int, ShardCall] = {}
        timings_ms: dict[str, float] = {}
        if query.text is None:
            gathered = await self._search(collection, query, (), NOTHING, calls, deadline)
            return merged(collection, query, NOTHING, gathered, calls, timings_ms)
        began = time.perf_counter()
        words = self._analyze(query.text, collection.language, stop_words=query.stop_words)
        terms = words[:MAX_QUERY_TERMS]
        distinct = sorted(set(terms))
        local = all(replica.local for replica in self._placement.everyone())
        known = None if local else self._terms.find(collection.uuid, distinct, self._asker.promised(collection.uuid))
        counted = Counted(known.statistics) if known else await self._count(collection, distinct, deadline, local=local)
        timings_ms["statistics"] = (time.perf_counter() - began) * 1000
        gathered = await self._search(collection, query, terms, counted, calls, deadline)
        if known is not None and self._terms.moved(collection.uuid, known, stands(gathered)):
            recounted = await self._count(collection, distinct, deadline, local=False)
            again = await self._search(collection, query, terms, recounted, calls, deadline)
            if len(again.answers) >= len(gathered.answers):
                known, counted, gathered = None, recounted, again
        if not local and known is None and counted.statistics and counted.whole and is_whole(collection, gathered):
            self._terms.learn(collection.uuid, counted.statistics, stands(gathered))
        return replace(merged(collection, query, counted, gathered, calls, timings_ms), terms=terms)

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> Fetched:
        """See Retriever."""
        self._check_open()
        ids: dict[int, list[str]] = {}
        for candidate in candidates:
            ids.setdefault(candidate.shard, []).append(candidate.id)
        gathered = await self._calls.side_by_side(
            {
                shard: self._asker.ask(
                    collection,
                    shard,
                    "fetch",
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
        return Fetched(found, frozenset(gathered.failures.keys() | gathered.late), gathered.late)

    async def matching(self, collection: Collection, filter: Any, deadline: Deadline, *, limit: int) -> list[Match]:
        """See Retriever. The order is that of the shards' numbers, and in each its own."""
        self._check_open()
        gathered = await self._calls.side_by_side(
            {
                shard: self._asker.ask(
                    collection,
                    shard,
                    "matching",
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
        gathered = await self._calls.side_by_side(
            {shard: self._asker.wait_applied(collection, shard, seq, deadline) for shard in range(collection.shards)},
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
        gathered = await self._calls.side_by_side(calls, deadline)
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
        self._terms.forget(collection.uuid)
        forgetting = [replica.host.forget(collection) for replica in self._placement.everyone()]
        for outcome in await asyncio.gather(*forgetting, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.warning("host_did_not_forget", collection=collection.name, error=repr(outcome))

    async def aclose(self) -> None:
        """Drop late answers; the hosts stay open. Closing twice does no harm."""
        self._closed = True
        await self._calls.aclose()

    # --- asking

    async def _count(self, collection: Collection, terms: Sequence[str], deadline: Deadline, *, local: bool) -> Counted:
        """Ask all shards for the statistics of *terms*, for a share of the time left."""
        remaining_s = deadline.remaining_s()
        until = deadline if remaining_s == float("inf") else Deadline.after(remaining_s * STATISTICS_SHARE)
        calls = {
            shard: self._asker.ask(
                collection,
                shard,
                "statistics",
                lambda host, until, shard=shard: host.statistics(collection, shard, terms, until),  # type: ignore[misc]
                until,
            )
            for shard in range(collection.shards)
        }
        if local:
            # Microseconds each, and they do not wait: tasks for them would take longer.
            gathered = await self._calls.one_by_one(calls)
        else:
            gathered = await self._calls.side_by_side(calls, until)
        return add_up(collection, gathered)

    async def _search(
        self,
        collection: Collection,
        query: RetrievalQuery,
        terms: Sequence[str],
        counted: Counted,
        calls: dict[int, ShardCall],
        deadline: Deadline,
    ) -> Gathered[ShardAnswer]:
        question = ShardQuery(
            limit=query.limit,
            vector=query.vector,
            terms=terms,
            statistics=counted.statistics,
            filter=query.filter,
            match=query.match,
            prefix=query.prefix,
            exact=query.exact,
            explain=query.explain,
            facets=query.facets,
        )
        noted = calls if query.explain else None
        left_out = counted.left_out
        asked = {
            shard: self._asker.search(collection, shard, question, deadline, noted)
            for shard in range(collection.shards)
            if shard not in left_out
        }
        return await self._calls.side_by_side(asked, deadline)

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
        gathered = await self._calls.side_by_side(calls, deadline)
        answers: dict[str, list[T]] = {}
        for index, answer in sorted(gathered.answers.items()):
            answers.setdefault(asked[index][0].name, []).append(answer)
        return answers

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady("The shards are closed: the service is shutting down")
