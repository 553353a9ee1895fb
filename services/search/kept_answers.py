"""Answers that were given before: what makes two questions the same, and which answers are still true."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
from pydantic import BaseModel

from services.common.errors import TercetError
from services.common.wire.search import CacheExplanation, CacheReply, SearchReply, SearchRequest
from services.search.answer import Answer
from services.search.flights import Flights
from services.search.ports import CacheEntry, Ledger, ResultCache, SharedResultCache, Watermarks
from services.search.run import Run

Decision = Literal["fresh", "moved", "unproven", "absent", "off", "unavailable"]

# What decides how an answer is asked for, and not what it is.
_ASKING = {"collection", "timeout_ms", "min_seq", "cache", "explain", "max_stale_s", "require"}
_FIELDS = tuple(sorted(set(SearchRequest.model_fields) - _ASKING))
# Answers of a version whose replies have another shape are other answers.
_SHAPE = hashlib.blake2b(orjson.dumps(SearchReply.model_json_schema()), digest_size=8).hexdigest()

CLAIM_S = 0.4  # A process that dies with a claim holds the others up for so long at most.
EXTEND_S = 0.15
WAIT_SHARE = 0.5  # Of its time a search waits for another process so long at most.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.004, 0.05
SKEW_S = 5.0  # How far two machines' clocks may be apart.
HISTORY_WAIT_S = 0.1
MAX_SETTLING = 64


class CacheNotes:
    """What is to be noted of the cache; this one notes nothing."""

    def looked(self, outcome: str, age_s: float | None) -> None:
        """Note how a look ended: `memory` or `redis` for a hit, with its age, or the decision that was none."""

    def joined(self, where: str) -> None:
        """Note that an answer was made once for two callers of this `process`, or by an `other` one."""

    def stale(self) -> None:
        """Note that an older answer was served as nothing better could be made."""


@dataclass(frozen=True, slots=True)
class Look:
    """
    What the cache says to a search.

    *fresh* is an answer that is still true; *spare* an older one, flagged `stale`, for when nothing can be searched.
    *key* is None where the search passes the cache by.
    """

    key: str | None
    fresh: Answer | None
    spare: Answer | None
    decision: Decision
    as_of: int | None = None
    age_ms: int | None = None
    watermark: int | None = None

    @property
    def explanation(self) -> CacheExplanation:
        """The same for the reply."""
        return CacheExplanation(decision=self.decision, as_of=self.as_of, age_ms=self.age_ms, watermark=self.watermark)


@dataclass(slots=True)
class _Judged:
    """An entry, how old it is (None: a clock is wrong), and what it is worth to one search."""

    entry: CacheEntry
    layer: str
    age_s: float | None
    decision: Decision
    asked: bool = False
    watermark: int | None = None

    @property
    def age_ms(self) -> int:
        return int((self.age_s or 0.0) * 1000)

    def answer(self, run: Run, *, stale: bool) -> Answer:
        cache = CacheReply(hit=True, age_ms=self.age_ms, stale=stale)
        return Answer.kept(self.entry.body, cache, (*run.degraded, "stale") if stale else tuple(run.degraded))


@dataclass(frozen=True, slots=True)
class _Made:
    answer: Answer
    as_of: int
    began_at: float


class KeptAnswers:
    """
    The result cache: *cache* in this process, before *shared* where there is one.

    *settings* are those that decide an answer besides the request. An entry may be given as fresh for *ttl_s*, and,
    when nothing can be searched, for *stale_if_error_s*.
    """

    def __init__(
        self,
        cache: ResultCache,
        watermarks: Watermarks,
        ledger: Ledger,
        settings: Sequence[Any],
        *,
        ttl_s: float = 300.0,
        stale_if_error_s: float = 0.0,
        shared: SharedResultCache | None = None,
        notes: CacheNotes | None = None,
    ) -> None:
        self._cache = cache
        self._watermarks = watermarks
        self._ledger = ledger
        self._settings = [_SHAPE, *settings]
        self._ttl_s = ttl_s
        self._stale_if_error_s = stale_if_error_s
        self._shared = shared
        self._notes = notes or CacheNotes()
        self._flights: Flights[_Made] = Flights(joined=lambda: self._notes.joined("process"))
        self._settling: set[asyncio.Task[None]] = set()

    @property
    def available(self) -> bool:
        """Whether every layer can be reached, as far as is known."""
        return self._cache.available and (self._shared is None or self._shared.available)

    @property
    def flights(self) -> int:
        """How many answers are being made that others may join."""
        return self._flights.under_way

    async def look(self, run: Run) -> Look:
        """
        Say what is kept for *run*'s question, and whether it is still true.

        Notes `cache_unavailable` in *run* where the shared cache was needed and cannot be reached.
        """
        if not run.request.cache:
            return Look(None, None, None, "off")
        key = self._key(run)
        with run.timed("cache"):
            found = await self._find(run, key)
        if found is None:
            decision: Decision = "absent" if self.available else "unavailable"
            self._notes.looked(decision, None)
            return Look(None if run.request.explain else key, None, None, decision)
        fresh = found.decision == "fresh"
        self._notes.looked(found.layer if fresh else found.decision, found.age_s if fresh else None)
        told = (found.decision, found.entry.as_of, found.age_ms, found.watermark)
        if run.request.explain:
            return Look(None, None, None, *told)
        if fresh:
            return Look(key, found.answer(run, stale=False), None, *told)
        in_time = found.age_s is not None and found.age_s <= self._stale_if_error_s
        return Look(key, None, found.answer(run, stale=True) if in_time else None, *told)

    async def once(self, run: Run, look: Look, make: Callable[[], Awaitable[SearchReply]]) -> Answer:
        """
        Return *make*'s reply, made once for all searches that ask the same at the same time, and keep it if it is whole.

        What another search began before this one asked is taken only where it is true for all that was acknowledged by
        then (or within `max_stale_s`). A caller that is cancelled harms no other one; see Flights for leaders in a hurry.
        With a shared cache, processes take turns too: those that come second wait for the entry, half of their time at
        most.

        Raises what *make* raises, and DeadlineExceeded where another search's *make* took longer than *run* may.
        """
        if look.key is None:
            return Answer(await make())
        key = look.key

        async def good(made: _Made, older: bool, hurried: bool) -> bool:
            if hurried and made.answer.degraded:
                return False
            if not older or time.time() - made.began_at <= run.request.max_stale_s:
                return True
            watermark = look.watermark
            if watermark is None:
                watermark = await self._watermarks.read(run.collection, run.deadline)
            return watermark is not None and made.as_of >= watermark

        made = await self._flights.once(
            (key, run.request.require, run.request.min_seq),
            run.deadline,
            lambda: self._make(run, look, key, make),
            good=good,
        )
        return made.answer.flagged(run.degraded)

    def note_stale(self) -> None:
        """Note that a look's spare answer was served."""
        self._notes.stale()

    async def aclose(self) -> None:
        """Finish what is still to be written."""
        await asyncio.gather(*self._settling, return_exceptions=True)

    # --- looking

    def _key(self, run: Run) -> str:
        """Identify all that decides the answer but the collection's contents, which an entry's `as_of` stands for."""
        request, collection = run.request, run.collection
        asked = [getattr(request, name) for name in _FIELDS]
        parts = [collection.uuid, collection.fingerprint, run.tenant, self._settings, asked]
        raw = orjson.dumps(parts, default=_plain, option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(raw, digest_size=20).hexdigest()

    async def _find(self, run: Run, key: str) -> _Judged | None:
        """Return the best that is kept under *key*."""
        near = await self._cache.get(key)
        found = None if near is None else await self._judged(run, near, "memory")
        if self._shared is None:
            if not self._cache.available:
                run.degrade("cache_unavailable")
            return found
        if found is not None and found.decision == "fresh":
            return found
        far = await self._shared.get(key)
        if not self._shared.available:
            run.degrade("cache_unavailable")
        if far is None or (near is not None and far.created_at <= near.created_at):
            return found
        found = await self._judged(run, far, "redis", found)
        await self._cache.put(key, found.entry)
        return found

    async def _judged(self, run: Run, entry: CacheEntry, layer: str, before: "_Judged | None" = None) -> _Judged:
        """Return what *entry* is worth; the watermark is read once a look, and known *before* for a second entry."""
        request, age_s = run.request, _age_s(entry)
        found = _Judged(entry, layer, age_s, "moved")
        if age_s is not None and age_s > self._ttl_s:
            found.decision = "absent"
        elif request.min_seq is not None and entry.as_of < request.min_seq:
            found.decision = "moved"
        elif request.max_stale_s > 0 and age_s is not None and age_s <= request.max_stale_s:
            found.decision = "fresh"
        else:
            asked = before is not None and before.asked
            found.asked = True
            found.watermark = (
                before.watermark if asked and before else await self._watermarks.read(run.collection, run.deadline)
            )
            if found.watermark is None:
                found.decision = "unproven"
            elif entry.as_of >= found.watermark and (known := await self._in_present_history(run, entry)) is not None:
                found.entry, found.decision = known, "fresh"
        return found

    async def _in_present_history(self, run: Run, entry: CacheEntry) -> CacheEntry | None:
        """Return *entry*, of the present epoch, if what it is true for is still the ledger's; a restore may change that."""
        epoch = self._ledger.epoch
        if entry.epoch == epoch:
            return entry
        try:
            async with asyncio.timeout(HISTORY_WAIT_S):
                shared = await self._ledger.shares_history(run.collection.uuid, entry.epoch, entry.as_of)
        except (TercetError, TimeoutError):
            return None
        return replace(entry, epoch=epoch) if shared and self._ledger.epoch == epoch else None

    # --- making

    async def _make(self, run: Run, look: Look, key: str, make: Callable[[], Awaitable[SearchReply]]) -> _Made:
        """Make the answer, and keep it if it is whole: degraded ones would be given for good ones later."""
        shared = self._shared if self._shared is not None and self._shared.available else None
        claimed = shared is not None and await shared.claim(key, CLAIM_S)
        if shared is not None and not claimed:
            theirs = await self._from_another(run, look, key, shared)
            if theirs is not None:
                self._notes.joined("other")
                return theirs
        extending = asyncio.create_task(_extend(shared, key)) if shared is not None and claimed else None
        entry: CacheEntry | None = None
        try:
            epoch, began_at = self._ledger.epoch, time.time()
            reply = await make()
            answer = Answer(reply)
            if set(reply.degraded) <= {"cache_unavailable"}:
                entry = CacheEntry(reply.as_of, began_at, answer.head, epoch)
                if self._cache.available:
                    await self._cache.put(key, entry)
            return _Made(answer, reply.as_of, began_at)
        finally:
            if extending is not None:
                extending.cancel()
            if shared is not None and claimed:
                self._behind(shared.settle(key, entry))
            elif shared is not None and entry is not None:
                self._behind(shared.put(key, entry))

    async def _from_another(self, run: Run, look: Look, key: str, shared: SharedResultCache) -> _Made | None:
        """Return the answer that another process makes, once it is kept; None where that ends otherwise or takes long."""
        pause_s = FIRST_PAUSE_S
        patience = run.deadline.at_most(run.deadline.remaining_s() * WAIT_SHARE)
        claimed = True
        while claimed and not patience.passed:
            await asyncio.sleep(min(pause_s, patience.remaining_s()))
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
            entry, claimed = await shared.peek(key)
            if entry is not None and (look.as_of is None or entry.as_of > look.as_of or not claimed):
                found = await self._judged(run, entry, "redis")
                if found.decision == "fresh":
                    await self._cache.put(key, found.entry)
                    return _Made(found.answer(run, stale=False), found.entry.as_of, found.entry.created_at)
        return None

    def _behind(self, writing: Coroutine[Any, Any, None]) -> None:
        """Write to the shared cache while the answer is on its way already; not at all when too much waits for that."""
        if len(self._settling) >= MAX_SETTLING:
            writing.close()
            return
        task = asyncio.create_task(writing)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)


async def _extend(shared: SharedResultCache, key: str) -> None:
    """Keep a claim while its answer takes long; one that is quick never comes to it."""
    while True:
        await asyncio.sleep(EXTEND_S)
        await shared.extend(key, CLAIM_S)


def _age_s(entry: CacheEntry) -> float | None:
    """Return how old *entry* is; None where it is from the future, as a clock was or is wrong."""
    age_s = time.time() - entry.created_at
    return None if age_s < -SKEW_S else max(0.0, age_s)


def _plain(value: Any) -> Any:
    """Return a field of a request as JSON knows it, the same in every process."""
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"a request has a field of {type(value).__name__}")
