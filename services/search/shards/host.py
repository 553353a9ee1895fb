"""The shards of this process: opened when they are needed, following the ledger, kept up, and closed when idle."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
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
from services.search.shards.follower import Follower, Slot
from services.search.shards.local import LocalShard
from services.search.shards.slices import ledger_slice
from services.search.shards.upkeep import Upkeep

HOUSEKEEPING_S = 0.5
CLOSING_GRACE_S = 5.0  # how long closing waits for calls under way, and then for all its snapshots

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HostOptions:
    """
    Which shards a host has, and how it keeps them.

    It is node *node* of *nodes* and has the shards s with s mod *nodes* = *node*. Without a notice the ledger is looked
    at every *poll_s*. A collection that nobody used for *idle_close_s* is closed, and the longest unused ones when more
    than *max_open* are open.
    """

    node: int = 0
    nodes: int = 1
    poll_s: float = 1.0
    snapshot_interval_s: float = 300.0
    snapshot_operations: int = 100_000
    idle_close_s: float = 900.0
    max_open: int = 100


@dataclass(slots=True, eq=False)
class _Hosted:
    """A collection that is open, how many calls are using it now, and when the last one did."""

    follower: Follower
    used_at: float
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def using(self, number: int) -> Iterator[tuple[Slot, LocalShard]]:
        """Keep the collection open while a shard is used. Raises NotReady while that is not open."""
        shard = self.follower.shard(number)
        self.users += 1
        try:
            yield self.follower.slots[number], shard
        finally:
            self.users -= 1
            self.used_at = _now()
            if not self.users:
                self.unused.set()


class LocalHost:
    """
    The `ShardHost` port over shards in this process.

    A collection is opened when it is first named, unless `start` did; its shards are searched while they catch up.
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
        self._open: dict[str, _Hosted] = {}
        self._openings: dict[str, asyncio.Task[_Hosted]] = {}
        self._closings: dict[str, asyncio.Task[None]] = {}
        self._asleep: dict[str, tuple[Collection, list[ShardStanding]]] = {}
        self._forgotten: set[str] = set()
        self._forgetting: set[asyncio.Task[None]] = set()
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._upkeep = Upkeep(
            lambda: [hosted.follower for hosted in self._open.values()],
            snapshot_interval_s=options.snapshot_interval_s,
            snapshot_operations=options.snapshot_operations,
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
        behind = []
        for collection in collections:
            if await self._has_news(collection):
                behind.append(collection)
        if behind:
            await asyncio.wait([self._opening(collection) for collection in behind[: self._options.max_open]])
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
        hosted.users += 1  # While somebody waits for a collection it is not idle.
        try:
            return await hosted.follower.wait_applied(shard, seq, _seconds(deadline))
        finally:
            hosted.users -= 1
            hosted.used_at = _now()

    async def standings(self, collection: Collection, deadline: Deadline) -> list[ShardStanding]:
        """See ShardHost. A collection that is closed for being idle is not opened; it stands where its snapshots do."""
        asleep = self._asleep.get(collection.uuid)
        if asleep is not None:
            return asleep[1]
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
        self._forgotten.add(collection.uuid)
        task = asyncio.create_task(self._forget(collection.uuid))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)
        await asyncio.shield(task)

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

    async def _hosted(self, collection: Collection, deadline: Deadline) -> _Hosted:
        opening = self._opening(collection)
        if not opening.done():
            await asyncio.wait({opening}, timeout=_seconds(deadline))
        if not opening.done():
            raise DeadlineExceeded(f"The collection {collection.name!r} was not open in time")
        return opening.result()

    def _opening(self, collection: Collection) -> asyncio.Task[_Hosted]:
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

    async def _open_collection(self, collection: Collection) -> _Hosted:
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
        hosted = self._open[collection.uuid] = _Hosted(follower, _now())
        self._asleep.pop(collection.uuid, None)
        self._upkeep.opened(follower)
        return hosted

    def _opened(self, collection: Collection, opening: asyncio.Task[_Hosted]) -> None:
        """Make room for others, or log why an opening failed, as nobody may be waiting for it."""
        self._openings.pop(collection.uuid, None)
        if not opening.cancelled() and (error := opening.exception()) is not None:
            _log.warning("collection_not_opened", collection=collection.name, error=repr(error))
        unused = sorted((hosted.used_at, uuid) for uuid, hosted in self._open.items() if not hosted.users)
        for _, uuid in unused[: max(0, len(self._open) - self._options.max_open)]:
            self._close(uuid)

    def _close(self, uuid: str) -> asyncio.Task[None]:
        hosted = self._open.pop(uuid)
        closing = self._closings[uuid] = asyncio.create_task(self._close_collection(hosted))
        closing.add_done_callback(lambda _: self._closings.pop(uuid, None))
        return closing

    async def _close_collection(self, hosted: _Hosted) -> None:
        follower = hosted.follower
        await follower.stop()
        if follower.collection.uuid not in self._forgotten:
            try:
                async with asyncio.timeout(CLOSING_GRACE_S):
                    await self._upkeep.snapshot_changed(follower)
            except TimeoutError:
                _log.warning("closed_without_snapshot", collection=follower.collection.name)
            self._asleep[follower.collection.uuid] = (follower.collection, self._standings(follower))
        hosted.unused.clear()
        if hosted.users:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_GRACE_S):
                    await hosted.unused.wait()
        await follower.aclose()

    # --- the ends of collections

    def _gone(self, collection: Collection) -> None:
        """Forget a collection that the ledger turned out not to have any more."""
        self._forgotten.add(collection.uuid)
        task = asyncio.create_task(self._forget(collection.uuid))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    async def _forget(self, uuid: str) -> None:
        opening = self._openings.get(uuid)
        if opening is not None:
            await asyncio.wait({opening})
        if uuid in self._open:
            self._close(uuid)
        closing = self._closings.get(uuid)
        if closing is not None:
            await asyncio.wait({closing})
        self._asleep.pop(uuid, None)
        self._upkeep.forget(uuid)
        await self._discard(uuid)

    async def _discard(self, uuid: str) -> None:
        try:
            await asyncio.to_thread(self._directory.remove, uuid)
        except OSError:
            _log.warning("shards_not_removed", collection=uuid, exc_info=True)

    # --- in the background

    async def _has_news(self, collection: Collection) -> bool:
        """Whether the ledger has operations that the newest snapshots lack; note how those stand if not."""
        try:
            seq = (await self._ledger.state(collection.uuid)).seq
        except NotFound:
            return False
        kept = [
            await asyncio.to_thread(self._directory.standing, collection, number)
            for number in self._numbers(collection)
        ]
        standings = [standing for standing in kept if standing is not None and standing.applied_seq == seq]
        if len(standings) < len(kept):
            return seq > 0
        self._asleep[collection.uuid] = (collection, standings)
        return False

    def _numbers(self, collection: Collection) -> list[int]:
        return [number for number in range(collection.shards) if number % self._options.nodes == self._options.node]

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(min(HOUSEKEEPING_S, self._options.idle_close_s))
            long_ago = _now() - self._options.idle_close_s
            for uuid, hosted in list(self._open.items()):
                if not hosted.users and max(hosted.used_at, hosted.follower.changed_at) < long_ago:
                    self._close(uuid)

    async def _listen(self) -> None:
        """Pass the news of other processes' writes on to the collections that they are for, closed ones too."""
        while not self._ledger.exclusive:
            try:
                await self._ledger.wait_for_news(self._options.poll_s)
            except Exception as error:
                _log.warning("no_news_of_the_ledger", error=repr(error))
                await asyncio.sleep(self._options.poll_s)
            for uuid, hosted in list(self._open.items()):
                hosted.follower.notify(self._ledger.heard_seq(uuid))
            for uuid, (collection, standings) in list(self._asleep.items()):
                reached = min((standing.applied_seq for standing in standings), default=0)
                if self._ledger.heard_seq(uuid) > reached:
                    self.notify(collection, self._ledger.heard_seq(uuid))


def _now() -> float:
    return asyncio.get_running_loop().time()


def _seconds(deadline: Deadline) -> float | None:
    """Return the time left as a timeout for asyncio: None for ever, never negative."""
    remaining_s = deadline.remaining_s()
    return None if remaining_s == float("inf") else max(0.0, remaining_s)
