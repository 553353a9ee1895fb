"""What a host does with its shards while nobody asks: maintenance of the indexes, snapshots, and closing idle ones."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from services.search.shards.follower import Follower, Slot
from services.search.shards.pace import GivenUp

QUIET_S = 3.0  # without operations for so long a collection is idle: all its segments may be made one
LOOK_EVERY_S = 0.5
REST_AFTER_FAILURE_S = 30.0

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class SlotHistory:
    """
    The snapshots of one shard that this process has seen made: the newest two, and when the newest was made.

    *unkept_s* is how long maintenance worked since then, and *nothing_due* that it has no more to do for now.
    """

    made_at: float
    newest_seq: int = 0
    older_seq: int = 0
    resting_until: float = 0.0
    unkept_s: float = 0.0
    nothing_due: bool = False

    def made(self, seq: int) -> None:
        """Note that there is a snapshot true for *seq*."""
        if seq > self.newest_seq:
            self.older_seq, self.newest_seq = self.newest_seq, seq
        self.made_at = _now()


class Upkeep:
    """
    Looks after the shards of the followers that *open_followers* returns, one piece of work at a time.

    A snapshot of a shard is due *snapshot_interval_s* after the last one if it changed, after *snapshot_operations*, or
    once maintenance that took *worth_keeping_s* is done: a start from an older one would have to do it again.
    *note_seconds* is told how long each piece of maintenance took.
    """

    def __init__(
        self,
        open_followers: Callable[[], Iterable[Follower]],
        *,
        snapshot_interval_s: float,
        snapshot_operations: int,
        worth_keeping_s: float,
        note_seconds: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._followers = open_followers
        self._interval_s = snapshot_interval_s
        self._operations = snapshot_operations
        self._worth_keeping_s = worth_keeping_s
        self._note_seconds = note_seconds
        self._histories: dict[tuple[str, int], SlotHistory] = {}
        self._snapshotting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, in the background."""
        self._tasks = [asyncio.create_task(self._maintain()), asyncio.create_task(self._take_snapshots())]

    async def aclose(self) -> None:
        """Stop; a piece of work that is under way goes on in its thread."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def history(self, uuid: str, number: int) -> SlotHistory:
        """Return what is known of a shard's snapshots."""
        return self._histories.setdefault((uuid, number), SlotHistory(_now()))

    def forget(self, uuid: str) -> None:
        """Forget a collection's snapshots."""
        for key in [key for key in self._histories if key[0] == uuid]:
            del self._histories[key]

    def opened(self, follower: Follower) -> None:
        """Note which snapshots the shards of *follower* were loaded from."""
        for slot in follower.slots.values():
            history = self.history(follower.collection.uuid, slot.number)
            if slot.shard is not None and slot.shard.origin is not None:
                history.made(slot.shard.origin.seq)

    @property
    def snapshot_age_s(self) -> float:
        """How long ago the newest snapshot was made of that changed shard for which it is longest; 0 if none changed."""
        ages = [
            _now() - self.history(follower.collection.uuid, slot.number).made_at
            for follower in self._followers()
            for slot in follower.slots.values()
            if self._changed(follower, slot)
        ]
        return max(ages, default=0.0)

    async def snapshot(self, follower: Follower, slot: Slot) -> int:
        """Write a snapshot of a shard, if it may have one, and return the operation number of its newest."""
        history = self.history(follower.collection.uuid, slot.number)
        async with self._snapshotting:
            if slot.shard is None or slot.epoch is None or slot.lost or slot.applied_seq == 0:
                return history.newest_seq
            unkept_s = history.unkept_s
            history.made(await slot.shard.snapshot(slot.epoch))
            history.unkept_s -= unkept_s
        return history.newest_seq

    async def snapshot_changed(self, follower: Follower) -> None:
        """Write a snapshot of each shard that changed since its last; what fails is logged."""
        for slot in follower.slots.values():
            if self._changed(follower, slot):
                await self._try_snapshot(follower, slot)

    # --- in the background

    async def _maintain(self) -> None:
        while True:
            worked = False
            for follower in list(self._followers()):
                for slot in follower.slots.values():
                    worked = await self._maintain_shard(follower, slot) or worked
            if not worked:
                await asyncio.sleep(LOOK_EVERY_S)

    async def _maintain_shard(self, follower: Follower, slot: Slot) -> bool:
        history = self.history(follower.collection.uuid, slot.number)
        shard = slot.shard
        if shard is None or slot.lost or history.resting_until > _now():
            return False
        began = _now()
        try:
            worked = await shard.maintain(idle=began - follower.changed_at > QUIET_S and not slot.catching_up)
        except GivenUp:
            return False
        except Exception:
            if slot.shard is shard:  # Otherwise it was closed meanwhile.
                history.resting_until = _now() + REST_AFTER_FAILURE_S
                _log.warning(
                    "maintenance_failed", collection=follower.collection.name, shard=slot.number, exc_info=True
                )
            return False
        history.nothing_due = not worked
        if worked:
            history.unkept_s += _now() - began
            self._note_seconds(_now() - began)
        return worked

    async def _take_snapshots(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for follower in list(self._followers()):
                for slot in follower.slots.values():
                    if self._due(follower, slot):
                        await self._try_snapshot(follower, slot)

    def _changes(self, follower: Follower, slot: Slot) -> int:
        history = self.history(follower.collection.uuid, slot.number)
        if slot.applied_seq < history.newest_seq and not slot.lost:  # It began again, and its snapshots are of no use.
            history.newest_seq = history.older_seq = 0
        return slot.applied_seq - history.newest_seq

    def _changed(self, follower: Follower, slot: Slot) -> bool:
        return self._changes(follower, slot) > 0 or (slot.shard is not None and slot.shard.changed)

    def _due(self, follower: Follower, slot: Slot) -> bool:
        history = self.history(follower.collection.uuid, slot.number)
        if history.resting_until > _now() or not self._changed(follower, slot):
            return False
        worth_keeping = history.nothing_due and history.unkept_s >= self._worth_keeping_s
        many = self._changes(follower, slot) >= self._operations
        return worth_keeping or many or _now() - history.made_at >= self._interval_s

    async def _try_snapshot(self, follower: Follower, slot: Slot) -> None:
        try:
            await self.snapshot(follower, slot)
        except Exception:
            self.history(follower.collection.uuid, slot.number).resting_until = _now() + REST_AFTER_FAILURE_S
            _log.warning("snapshot_failed", collection=follower.collection.name, shard=slot.number, exc_info=True)


def _now() -> float:
    return asyncio.get_running_loop().time()
