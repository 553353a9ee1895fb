"""The shards of this process: opened when they are needed, following the ledger, kept up, and closed when idle."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import structlog

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, NotFound, NotReady
from services.search.ports import (
    AuditReport,
    Collection,
    Ledger,
    LexicalStatistics,
    Match,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards.directory import ShardDirectory
from services.search.shards.dormant import Dormant
from services.search.shards.follower import Follower
from services.search.shards.hosted import Hosted
from services.search.shards.slices import ledger_slice
from services.search.shards.upkeep import Upkeep

HOUSEKEEPING_S = 0.5
CLOSING_GRACE_S = 5.0  # how long closing waits for calls under way, and then for all its snapshots
OPENED_AT_ONCE = 4  # collections that are opened unasked, as the ledger has news of them
KEPT_S = 10.0  # what was opened or used so lately is not closed for what is opened unasked

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HostOptions:
    """
    Which shards a host has, and how it keeps them.

    It is node *node* of *nodes* and has the shards s with s mod *nodes* = *node*. Without a notice the ledger is looked
    at every *poll_s*. A collection that nobody used for *idle_close_s* is closed (with inf none is, and the start opens
    all), and the longest unused ones when more than *max_open* are open. See Upkeep for when it takes snapshots.
    """

    node: int = 0
    nodes: int = 1
    poll_s: float = 1.0
    snapshot_interval_s: float = 300.0
    snapshot_operations: int = 100_000
    worth_keeping_s: float = 5.0
    idle_close_s: float = 900.0
    max_open: int = 100


class LocalHost:
    """
    The `ShardHost` port over shards in this process.

    A collection is opened when it is first named, unless `start` did; its shards are searched while they catch up. One
    that other processes write to is opened too, wherever it was created, so that it is caught up before it is asked.
    """

    def __init__(
        self,
        name: str,
        ledger: Ledger,
        directory: ShardDirectory,
        options: HostOptions,
        *,
        note_maintenance_seconds: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Serve the collections of *ledger* from *directory*, which is not closed by this."""
        self._name = name
        self._ledger = ledger
        self._directory = directory
        self._options = options
        self._open: dict[str, Hosted] = {}
        self._openings: dict[str, asyncio.Task[Hosted]] = {}
        self._closings: dict[str, asyncio.Task[None]] = {}
        self._forgotten: set[str] = set()
        self._forgetting: set[asyncio.Task[None]] = set()
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._dormant = Dormant(ledger, directory, self._numbers, self._is_awake, look_every_s=options.poll_s)
        self._upkeep = Upkeep(
            lambda: [hosted.follower for hosted in self._open.values()],
            snapshot_interval_s=options.snapshot_interval_s,
            snapshot_operations=options.snapshot_operations,
            worth_keeping_s=options.worth_keeping_s,
            note_seconds=note_maintenance_seconds,
        )

    @property
    def name(self) -> str:
        """How failures, metrics and logs call it."""
        return self._name

    async def start(self) -> None:
        """
        Remove what is left of deleted collections, open those with newer operations, and begin the upkeep.

        No more than `max_open` are opened. Raises what the ledger raises.
        """
        collections = await self._ledger.list_collections()
        known = {collection.uuid for collection in collections}
        for uuid in await asyncio.to_thread(self._directory.uuids):
            if uuid not in known:
                await self._discard(uuid)
        for collection in collections:
            await self._dormant.learn(collection)
        wanted = self._dormant.collections() if self._options.idle_close_s == inf else self._dormant.behind()
        if wanted:
            await asyncio.wait([self._opening(collection) for collection in wanted[: self._options.max_open]])
        self._upkeep.start()
        self._tasks = [asyncio.create_task(self._keep_house()), asyncio.create_task(self._listen())]

    # --- the port

    async def statistics(
        self, collection: Collection, shard: int, terms: Sequence[str], deadline: Deadline
    ) -> LexicalStatistics:
        """See ShardHost."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.using(shard) as (_, found):
            return await found.statistics(terms)

    async def search(self, collection: Collection, shard: int, query: ShardQuery, deadline: Deadline) -> ShardAnswer:
        """See ShardHost."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.using(shard) as (slot, found):
            behind = slot.catching_up  # Before: the answer is of what the shard had when the search began.
            answer = await found.search(query)
            return replace(answer, catching_up=True) if behind else answer

    async def fetch(
        self, collection: Collection, shard: int, ids: Sequence[str], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        """See ShardHost."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.using(shard) as (_, found):
            return await found.fetch(ids, vectors=vectors)

    async def matching(
        self, collection: Collection, shard: int, filter: Any, deadline: Deadline, *, limit: int
    ) -> list[Match]:
        """See ShardHost."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.using(shard) as (_, found):
            return await found.matching(filter, limit=limit)

    async def wait_applied(self, collection: Collection, shard: int, seq: int, deadline: Deadline) -> bool:
        """See ShardHost. False too when the collection's end came first."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.busy():  # While somebody waits for a collection it is not idle.
            return await hosted.follower.wait_applied(shard, seq, _seconds(deadline))

    async def standings(self, collection: Collection, deadline: Deadline) -> list[ShardStanding]:
        """See ShardHost. A collection that is closed for being idle is not opened; it stands where its snapshots do."""
        dormant = self._dormant.standings(collection.uuid)
        if dormant is not None:
            return dormant
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        return self._standings(hosted.follower)

    async def audit(self, collection: Collection, shard: int, deadline: Deadline, *, repair: bool) -> AuditReport:
        """See ShardHost."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.using(shard) as (_, found):
            return await found.audit(ledger_slice(self._ledger, collection, shard), repair=repair)

    async def snapshot(self, collection: Collection, shard: int, deadline: Deadline) -> int:
        """See ShardHost. 0 while the shard has nothing to keep, or none that the ledger vouches for."""
        hosted = self._open.get(collection.uuid) or await self._hosted(collection, deadline)
        with hosted.using(shard) as (slot, _):
            return await self._upkeep.snapshot(hosted.follower, slot)

    def notify(self, collection: Collection, seq: int) -> None:
        """Look at the ledger at once, if *seq* is news; opens the collection."""
        hosted = self._open.get(collection.uuid)
        if hosted is not None:
            hosted.used_at = _now()
            hosted.follower.notify(seq)
        elif not self._closed and collection.uuid not in self._forgotten:
            self._opening(collection)

    async def forget(self, collection: Collection) -> None:
        """Close and remove the shards of a deleted collection; it is not found from here on."""
        await asyncio.shield(self._gone(collection))

    async def forget_if_deleted(self, collection: Collection) -> None:
        """Forget the collection if the ledger has it no more."""
        try:
            await self._ledger.state(collection.uuid)
        except NotFound:
            await self.forget(collection)

    async def aclose(self) -> None:
        """Write snapshots of what changed, stop following and close all shards. Closing twice does no harm."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await self._upkeep.aclose()
        self._directory.hurry()
        for uuid in list(self._openings):
            with suppress(Exception):
                await self._openings[uuid]
        for uuid in list(self._open):
            self._close(uuid)
        closings = [*self._closings.values(), *self._forgetting]
        if closings:
            await asyncio.wait(closings)

    # --- how it stands

    @property
    def lag(self) -> int:
        """How many operations the shard that is furthest behind lacks."""
        return max((hosted.follower.lag for hosted in self._open.values()), default=0)

    @property
    def snapshot_age_s(self) -> float:
        """See Upkeep."""
        return self._upkeep.snapshot_age_s

    def disk_bytes(self) -> tuple[float, float]:
        """See ShardDirectory."""
        return self._directory.disk_bytes()

    def open_standings(self) -> list[ShardStanding]:
        """Return how all shards stand that are open."""
        return [standing for hosted in self._open.values() for standing in self._standings(hosted.follower)]

    def kept_seq(self, uuid: str) -> int:
        """Return up to where every shard of a collection that this host has can do without the ledger's log."""
        hosted = self._open.get(uuid)
        numbers = hosted.follower.slots if hosted is not None else ()
        return min((self._upkeep.history(uuid, number).older_seq for number in numbers), default=0)

    def _standings(self, follower: Follower) -> list[ShardStanding]:
        return [slot.standing() for slot in follower.slots.values()]

    # --- opening and closing

    async def _hosted(self, collection: Collection, deadline: Deadline) -> Hosted:
        opening = self._opening(collection)
        if not opening.done():
            await asyncio.wait({opening}, timeout=_seconds(deadline))
        if not opening.done():
            raise DeadlineExceeded(f"The collection {collection.name!r} was not open in time")
        return opening.result()

    def _opening(self, collection: Collection) -> asyncio.Task[Hosted]:
        if self._closed:
            raise NotReady("The shards are closed: the service is shutting down")
        if collection.uuid in self._forgotten:
            raise NotFound(f"The collection {collection.name!r} was deleted")
        opening = self._openings.get(collection.uuid)
        if opening is None:
            opening = asyncio.create_task(self._open_collection(collection))
            opening.add_done_callback(lambda done: self._opened(collection, done))
            self._openings[collection.uuid] = opening
        return opening

    async def _open_collection(self, collection: Collection) -> Hosted:
        closing = self._closings.get(collection.uuid)
        if closing is not None:
            await asyncio.wait({closing})
        follower = Follower(
            self._ledger,
            collection,
            self._numbers(collection),
            self._directory.open,
            poll_s=self._options.poll_s,
            gone=lambda: self._gone(collection),
        )
        await follower.open()
        hosted = self._open[collection.uuid] = Hosted(follower)
        self._dormant.drop(collection.uuid)
        self._upkeep.opened(follower)
        return hosted

    def _opened(self, collection: Collection, opening: asyncio.Task[Hosted]) -> None:
        """Close what is one too many, or log why an opening failed, as nobody may be waiting for it."""
        self._openings.pop(collection.uuid, None)
        if not opening.cancelled() and (error := opening.exception()) is not None:
            _log.warning("collection_not_opened", collection=collection.name, error=repr(error))
            return
        unused = sorted(
            (hosted.catching_up, hosted.used_at, uuid)
            for uuid, hosted in self._open.items()
            if not hosted.users and uuid != collection.uuid
        )
        for _, _, uuid in unused[: max(0, len(self._open) - self._options.max_open)]:
            self._close(uuid)
        self._open_behind()

    def _open_behind(self) -> None:
        """Open some of what other processes wrote to: where there is room, or in place of what is caught up and unused."""
        if self._ledger.exclusive:
            return
        long_ago = _now() - min(KEPT_S, self._options.idle_close_s)
        open_ = self._open.values()
        spare = sum(not hosted.users and hosted.used_at < long_ago and not hosted.catching_up for hosted in open_)
        for collection in self._dormant.behind():
            if len(self._openings) + len(self._closings) >= OPENED_AT_ONCE:
                return
            if len(self._open) + len(self._openings) >= self._options.max_open + spare:
                return
            self.notify(collection, self._ledger.heard_seq(collection.uuid))

    def _close(self, uuid: str) -> asyncio.Task[None]:
        hosted = self._open.pop(uuid)
        closing = self._closings[uuid] = asyncio.create_task(self._close_collection(hosted))
        closing.add_done_callback(lambda _: self._was_closed(uuid))
        return closing

    def _was_closed(self, uuid: str) -> None:
        self._closings.pop(uuid, None)
        self._open_behind()

    async def _close_collection(self, hosted: Hosted) -> None:
        follower = hosted.follower
        await follower.stop()
        if follower.collection.uuid not in self._forgotten:
            try:
                async with asyncio.timeout(CLOSING_GRACE_S):
                    await self._upkeep.snapshot_changed(follower)
            except TimeoutError:
                _log.warning("closed_without_snapshot", collection=follower.collection.name)
            self._dormant.put(follower.collection, self._standings(follower))
        hosted.unused.clear()
        if hosted.users:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_GRACE_S):
                    await hosted.unused.wait()
        await follower.aclose()

    # --- the ends of collections

    def _gone(self, collection: Collection) -> asyncio.Task[None]:
        """Forget a collection that the ledger turned out not to have any more, in the background."""
        self._forgotten.add(collection.uuid)
        task = asyncio.create_task(self._forget(collection.uuid))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)
        return task

    async def _forget(self, uuid: str) -> None:
        opening = self._openings.get(uuid)
        if opening is not None:
            await asyncio.wait({opening})
        if uuid in self._open:
            self._close(uuid)
        closing = self._closings.get(uuid)
        if closing is not None:
            await asyncio.wait({closing})
        self._dormant.drop(uuid)
        self._upkeep.forget(uuid)
        await self._discard(uuid)

    async def _discard(self, uuid: str) -> None:
        try:
            await asyncio.to_thread(self._directory.remove, uuid)
        except OSError:
            _log.warning("shards_not_removed", collection=uuid, exc_info=True)

    # --- in the background

    def _numbers(self, collection: Collection) -> list[int]:
        return [number for number in range(collection.shards) if number % self._options.nodes == self._options.node]

    def _is_awake(self, uuid: str) -> bool:
        return any(uuid in known for known in (self._open, self._openings, self._closings, self._forgotten))

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(min(HOUSEKEEPING_S, self._options.idle_close_s))
            long_ago = _now() - self._options.idle_close_s
            for uuid, hosted in list(self._open.items()):
                if not hosted.users and max(hosted.used_at, hosted.follower.changed_at) < long_ago:
                    self._close(uuid)

    async def _listen(self) -> None:
        """Pass the news of other processes' writes on to the collections that they are for, closed and new ones too."""
        while not self._ledger.exclusive:
            try:
                await self._ledger.wait_for_news(self._options.poll_s)
                for uuid, hosted in list(self._open.items()):
                    hosted.follower.notify(self._ledger.heard_seq(uuid))
                for collection in await self._dormant.look():
                    await self.forget_if_deleted(collection)
            except Exception as error:
                _log.warning("no_news_of_the_ledger", error=repr(error))
                await asyncio.sleep(self._options.poll_s)
            self._open_behind()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _seconds(deadline: Deadline) -> float | None:
    """Return the time left as a timeout for asyncio: None for ever, never negative."""
    remaining_s = deadline.remaining_s()
    return None if remaining_s == float("inf") else max(0.0, remaining_s)
