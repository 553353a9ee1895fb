"""All shards of all collections in this process: each question goes to every shard of its collection side by side."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import structlog

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import InvalidInput, NotFound, NotReady
from services.search.ports import (
    Candidate,
    Collection,
    Ledger,
    LexicalStatistics,
    RetrievalQuery,
    Retrieved,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
)
from services.search.shards.follower import Follower, MakeShard, describe

T = TypeVar("T")

STATISTICS_SHARE = 0.25  # of the time left: a shard that hangs must not use up the search's time

_log = structlog.get_logger(__name__)


MAX_QUERY_TERMS = 512  # Of a longer question the first words count: each costs a list to read in every shard.


@dataclass(frozen=True, slots=True)
class _Gathered(Generic[T]):
    """What shards said, by number: the answers, why some failed, and which have not answered yet."""

    answers: Mapping[int, T]
    failures: Mapping[int, str]
    late: frozenset[int]


class LocalRetriever:
    """
    The `Retriever` port over shards in this process, which follow the ledger in the background.

    A collection is opened when it is first named, or by `open_collections`. Its shards are searched while they catch
    up. A shard whose writes fail is searched too, as of what it has, and `Retrieved.failures` says so.
    """

    def __init__(
        self,
        ledger: Ledger,
        make_shard: MakeShard,
        analyze: Callable[[str], list[str]],
        *,
        discard: Callable[[Collection], None] | None = None,
        poll_s: float = 1.0,
    ) -> None:
        """
        Serve the collections of *ledger* from shards that *make_shard(collection, number)* makes, in a thread.

        *analyze* turns a question into the terms that the shards know. *discard*, called in a thread, deletes what a
        forgotten collection's shards kept on disk. Without a `notify` the ledger is looked at every *poll_s* seconds.
        """
        self._ledger = ledger
        self._make_shard = make_shard
        self._analyze = analyze
        self._discard = discard
        self._poll_s = poll_s
        self._followers: dict[str, asyncio.Task[Follower]] = {}
        self._forgotten: set[str] = set()
        self._asking: set[asyncio.Task[Any]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._closed = False

    async def open_collections(self) -> None:
        """Open every collection of the ledger; they catch up in the background. Raises what the ledger raises."""
        openings = [self._opening(collection) for collection in await self._ledger.list_collections()]
        if openings:
            await asyncio.wait(openings)

    def notify(self, collection: Collection, seq: int) -> None:
        """Say that the ledger holds operations up to *seq*, so that the shards take them at once."""
        if self._closed or collection.uuid in self._forgotten:
            return
        opening = self._opening(collection)
        if opening.done():
            opening.result().notify(seq)

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        """
        Ask all shards side by side; those that fail or are late are reported, not raised.

        Raises:
            InvalidInput: A shard refused the query itself.
            NotFound: The collection was deleted.
        """
        follower = await self._follower(collection, deadline)
        if follower is None:
            return Retrieved((), collection.shards, 0, 0, {}, collection.shards, 0, {})
        failures = {slot.number: slot.failure for slot in follower.slots if slot.failure is not None}
        timings_ms: dict[str, float] = {}
        terms: Sequence[str] = ()
        statistics: LexicalStatistics | None = None
        refused: Mapping[int, str] = {}
        if query.text is not None:
            began = time.perf_counter()
            terms = self._analyze(query.text)[:MAX_QUERY_TERMS]
            statistics, refused = await self._statistics(follower, sorted(set(terms)), deadline)
            timings_ms["statistics"] = (time.perf_counter() - began) * 1000
        question = ShardQuery(query.limit, query.vector, terms, statistics, query.filter)
        gathered = await self._ask(
            {
                slot.number: slot.shard.search(question)
                for slot in follower.slots
                if slot.shard is not None and slot.number not in refused
            },
            _seconds(deadline),
        )
        merged = _merge(follower, gathered, {**failures, **refused, **gathered.failures}, timings_ms)
        return replace(merged, terms=terms, statistics=statistics)

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        """Return the stored fields of *candidates* by id; those that are gone, or whose shard fails, are missing."""
        follower = await self._follower(collection, deadline)
        if follower is None:
            return {}
        rows: dict[int, dict[int, str]] = {}
        for candidate in candidates:
            rows.setdefault(candidate.shard, {})[candidate.row] = candidate.id
        shards = {number: follower.slots[number].shard for number in rows}
        gathered = await self._ask(
            {
                number: shard.fetch(list(rows[number]), vectors=vectors)
                for number, shard in shards.items()
                if shard is not None
            },
            _seconds(deadline),
        )
        return {
            document.id: document
            for number, found in gathered.answers.items()
            for row, document in found.items()
            if rows[number].get(row) == document.id
        }

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        """Wait until every shard has applied *seq*; False when the deadline, or the collection's end, came first."""
        follower = await self._follower(collection, deadline)
        return follower is not None and await follower.wait_applied(seq, _seconds(deadline))

    async def applied_seq(self, collection: Collection) -> int:
        """Return the lowest `applied_seq` of the collection's shards."""
        follower = await self._follower(collection, NO_DEADLINE)
        return 0 if follower is None else follower.applied_seq

    async def forget(self, collection: Collection) -> None:
        """Close and remove the shards of a deleted collection; it is not found from here on."""
        self._forgotten.add(collection.uuid)
        closing = asyncio.create_task(self._close(self._followers.pop(collection.uuid, None), collection))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        await asyncio.shield(closing)

    async def aclose(self) -> None:
        """Stop all followers and close all shards; late answers are dropped. Closing twice does no harm."""
        self._closed = True
        for task in self._asking:
            task.cancel()
        while self._followers:
            _, opening = self._followers.popitem()
            closing = asyncio.create_task(self._close(opening, None))
            self._closings.add(closing)
            closing.add_done_callback(self._closings.discard)
        await asyncio.shield(asyncio.gather(*self._closings))

    # --- opening and closing

    def _opening(self, collection: Collection) -> asyncio.Task[Follower]:
        if self._closed:
            raise NotReady("The shards are closed: the service is shutting down")
        if collection.uuid in self._forgotten:
            raise NotFound(f"The collection {collection.name!r} was deleted")
        opening = self._followers.get(collection.uuid)
        if opening is None:
            opening = asyncio.create_task(self._open(collection))
            opening.add_done_callback(_opened)
            self._followers[collection.uuid] = opening
        return opening

    async def _open(self, collection: Collection) -> Follower:
        follower = Follower(self._ledger, collection, self._make_shard, poll_s=self._poll_s)
        try:
            await follower.open()
        except BaseException:
            self._followers.pop(collection.uuid, None)
            raise
        return follower

    async def _follower(self, collection: Collection, deadline: Deadline) -> Follower | None:
        """Return the collection's follower, opening it if need be; None when the deadline comes first."""
        opening = self._opening(collection)
        if not opening.done():
            await asyncio.wait({opening}, timeout=_seconds(deadline))
        return opening.result() if opening.done() else None

    async def _close(self, opening: asyncio.Task[Follower] | None, forgotten: Collection | None) -> None:
        if opening is not None:
            await asyncio.wait({opening})
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().aclose()
        if forgotten is not None and self._discard is not None:
            try:
                await asyncio.to_thread(self._discard, forgotten)
            except Exception:
                _log.warning("shards_not_removed", collection=forgotten.name, exc_info=True)

    # --- asking

    async def _statistics(
        self, follower: Follower, terms: Sequence[str], deadline: Deadline
    ) -> tuple[LexicalStatistics, Mapping[int, str]]:
        """Return the statistics of all shards that gave them in time, and why others failed."""
        remaining_s = _seconds(deadline)
        gathered = await self._ask(
            {slot.number: slot.shard.statistics(terms) for slot in follower.slots if slot.shard is not None},
            None if remaining_s is None else remaining_s * STATISTICS_SHARE,
        )
        return sum(gathered.answers.values(), LexicalStatistics(0, {})), gathered.failures

    async def _ask(self, calls: Mapping[int, Coroutine[Any, Any, T]], timeout_s: float | None) -> _Gathered[T]:
        """Run *calls* side by side: what is late is left to finish, what a cancelled caller asked is cancelled."""
        tasks = {number: asyncio.create_task(call) for number, call in calls.items()}
        for task in tasks.values():
            self._asking.add(task)
            task.add_done_callback(self._asked)
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=timeout_s)
        except asyncio.CancelledError:
            for task in tasks.values():
                task.cancel()
            raise
        answers: dict[int, T] = {}
        failures: dict[int, str] = {}
        for number, task in tasks.items():
            if not task.done():
                continue
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if isinstance(error, InvalidInput):
                raise error
            if error is None:
                answers[number] = task.result()
            else:
                failures[number] = describe(error)
        return _Gathered(answers, failures, frozenset(tasks) - answers.keys() - failures.keys())

    def _asked(self, task: asyncio.Task[Any]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, InvalidInput):
            _log.warning("shard_call_failed", exc_info=error)


def _merge(
    follower: Follower, gathered: _Gathered[ShardAnswer], failures: Mapping[int, str], timings_ms: dict[str, float]
) -> Retrieved:
    answers = gathered.answers.values()
    for answer in answers:
        for stage, spent in answer.timings_ms.items():
            timings_ms[stage] = max(spent, timings_ms.get(stage, 0.0))
    return Retrieved(
        candidates=[candidate for answer in answers for candidate in answer.candidates],
        total=len(follower.slots),
        ok=len(answers),
        catching_up=sum(follower.catching_up(answer.applied_seq) for answer in answers),
        failures=failures,
        timed_out=len(gathered.late),
        as_of=min((answer.applied_seq for answer in answers), default=0),
        timings_ms=timings_ms,
    )


def _opened(opening: asyncio.Task[Follower]) -> None:
    """Log why an opening failed, as nobody may be waiting for it."""
    if not opening.cancelled() and (error := opening.exception()) is not None:
        _log.warning("collection_not_opened", error=repr(error))


def _seconds(deadline: Deadline) -> float | None:
    """Return the time left as a timeout for asyncio: None for ever, never negative."""
    remaining_s = deadline.remaining_s()
    return None if remaining_s == float("inf") else max(0.0, remaining_s)
