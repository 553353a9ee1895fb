"""Keeps a host's shards of one collection true to the ledger: one task that tails the operations, page by page."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog

from services.common.errors import NotFound, NotReady
from services.search.ports import Collection, CollectionState, Ledger, Operation, ShardStanding
from services.search.shards.asking import describe
from services.search.shards.local import LocalShard
from services.search.shards.slices import shard_of

OpenShard = Callable[[Collection, int, bool], LocalShard]

PAGE = 512
FAR_BEHIND = 10_000  # operations: a shard that lacks more is catching up, whatever it lacks them for
PATIENCE_S = 2.0  # how long a page waits for its slowest shard before the others go on without it
GRACE_S = 10.0  # how long closing waits for work under way
FIRST_LOOK_S = 1.0  # how long opening waits for the ledger before the shards answer without it
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 30.0

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Slot:
    """
    The place of one shard: the shard, or why it could not be opened; *failure* is why it fell behind, if it did.

    *epoch* is the ledger's while the shard's operations were read; *checked*, whether that history was seen to be the
    present ledger's. The shard is catching up until it has reached *target*. *lost* shards have to begin again.
    """

    number: int
    shard: LocalShard | None = None
    failure: str | None = None
    attempts: int = 0
    retry_at: float = 0.0
    busy: bool = False
    epoch: str | None = None
    checked: bool = False
    target: int | None = None
    lost: bool = False

    @property
    def applied_seq(self) -> int:
        """The last operation that the shard has applied; 0 while there is no shard."""
        return 0 if self.shard is None else self.shard.applied_seq

    @property
    def catching_up(self) -> bool:
        """Whether the shard lacks operations that it should have by now, or is not known to have them."""
        return self.lost or self.failure is not None or self.target is None or self.applied_seq < self.target

    def take(self, shard: LocalShard) -> None:
        """Put a shard that has just been opened in place."""
        self.shard = shard
        self.epoch = shard.origin.epoch if shard.origin is not None else None
        self.checked = self.lost = False
        self.worked()

    def failed(self, what: str, error: Exception) -> None:
        """Note that *what* failed, and put the next attempt off, twice as long each time."""
        self.failure = f"{what}: {describe(error)}"
        self.retry_at = _now() + min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.attempts, 20))
        self.attempts += 1

    def worked(self) -> None:
        """Note that the last attempt went well."""
        self.failure, self.attempts, self.retry_at = None, 0, 0.0

    def standing(self) -> ShardStanding:
        """Say how the shard stands."""
        if self.shard is None:
            return ShardStanding(self.number, 0, 0, catching_up=True, failure=self.failure)
        return replace(self.shard.standing(), catching_up=self.catching_up, failure=self.failure)


class Follower:
    """
    The shards of one collection that a host has, and the task that applies the ledger's operations to them.

    Shards that stand at the same operation share a page. One whose `apply` raises is retried with back-off, and one
    that is behind or slow reads pages of its own until it has met the others, so that none holds the others up. A
    shard whose operations are not the ledger's (any more), or that lacks deletions which the ledger has forgotten,
    begins again from nothing, and answers meanwhile.
    """

    def __init__(
        self,
        ledger: Ledger,
        collection: Collection,
        numbers: Sequence[int],
        open_shard: OpenShard,
        *,
        poll_s: float,
        gone: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Follow *collection* with the shards *numbers*.

        *open_shard(collection, number, use_snapshots)* is called in a thread, as it reads files. *gone* is called when
        the ledger has no such collection any more.
        """
        self.collection = collection
        self.slots = {number: Slot(number) for number in numbers}
        self.changed_at = _now()
        self._ledger = ledger
        self._open = open_shard
        self._poll_s = poll_s
        self._gone = gone
        self._wake = asyncio.Event()
        self._waiting: set[tuple[int, int, asyncio.Future[bool]]] = set()
        self._working: set[asyncio.Task[None]] = set()
        self._ledger_failures = 0
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """
        Open the shards and begin to follow in the background.

        A shard that cannot be opened, or a ledger that cannot be read, is tried again later.

        Raises:
            NotFound: The collection was deleted meanwhile.
        """
        await asyncio.gather(*(self._open_shard(slot) for slot in self.slots.values()))
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._look()
        except NotFound:
            await self.aclose()
            raise
        except Exception as error:
            _log.warning("ledger_unreadable", collection=self.collection.name, error=repr(error))
        self._task = asyncio.create_task(self._follow())

    @property
    def applied_seq(self) -> int:
        """The last operation that every shard has applied."""
        return min((slot.applied_seq for slot in self.slots.values()), default=0)

    @property
    def lag(self) -> int:
        """How many operations the slowest shard lacks, as far as this process has heard."""
        return max(0, self._ledger.heard_seq(self.collection.uuid) - self.applied_seq) if self.slots else 0

    def shard(self, number: int) -> LocalShard:
        """Return a shard. Raises NotReady while it is not open, with why."""
        slot = self.slots.get(number)
        if slot is None:
            raise NotReady(f"Shard {number} of {self.collection.name!r} is not on this node: {self._hosted()}")
        if slot.shard is None:
            raise NotReady(f"Shard {number} of {self.collection.name!r} is not open: {slot.failure or 'it is opening'}")
        return slot.shard

    def notify(self, seq: int) -> None:
        """Look at the ledger at once, if *seq* is news."""
        if seq > self.applied_seq:
            self._wake.set()

    async def wait_applied(self, number: int, seq: int, timeout_s: float | None) -> bool:
        """Wait until the shard has applied *seq*; False when *timeout_s* or the closing came first. Raises NotReady."""
        slot = self.slots.get(number)
        if slot is None:
            self.shard(number)
            return False
        if slot.applied_seq >= seq:
            return True
        if self._closed:
            return False
        self._wake.set()
        waiting = (number, seq, asyncio.get_running_loop().create_future())
        self._waiting.add(waiting)
        try:
            await asyncio.wait({waiting[2]}, timeout=timeout_s)
            return waiting[2].done() and waiting[2].result()
        finally:
            self._waiting.discard(waiting)

    async def stop(self) -> None:
        """Stop following, the shards as they are; what hangs is given up after a while. Twice does no harm."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for _, _, future in self._waiting:
            if not future.done():
                future.set_result(False)
        if self._working:
            _, late = await asyncio.wait(self._working, timeout=GRACE_S)
            for task in late:
                task.cancel()

    async def aclose(self) -> None:
        """Stop following and close the shards. Closing twice does no harm."""
        await self.stop()
        shards = [slot.shard for slot in self.slots.values() if slot.shard is not None]
        for slot in self.slots.values():
            slot.shard = None
        await asyncio.gather(*map(self._close_shard, shards))

    # --- following

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            try:
                more = not self._nothing_new() and await self._round()
                self._ledger_failures = 0
            except NotFound:
                self._gone()
                return
            except Exception as error:
                _log.warning("following_failed", collection=self.collection.name, error=repr(error))
                await asyncio.sleep(min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._ledger_failures, 20)))
                self._ledger_failures += 1
                continue
            if not more:
                await self._pause()

    def _nothing_new(self) -> bool:
        """Whether the ledger need not even be asked, as none but this process writes to it."""
        heard = self._ledger.heard_seq(self.collection.uuid)
        return self._ledger.exclusive and all(
            slot.checked and not slot.lost and slot.failure is None and slot.applied_seq == heard
            for slot in self.slots.values()
        )

    async def _round(self) -> bool:
        """Take each idle shard one page on; True when there is more to do at once."""
        epoch = self._ledger.epoch
        state = await self._look()
        idle = [slot for slot in self.slots.values() if not slot.busy and slot.retry_at <= _now()]
        groups: dict[int, list[tuple[Slot, LocalShard]]] = {}
        for slot in idle:
            if slot.shard is not None and slot.checked and not slot.lost and slot.applied_seq < state.seq:
                groups.setdefault(slot.applied_seq, []).append((slot, slot.shard))
        uuid = self.collection.uuid
        pages = await asyncio.gather(*(self._ledger.operations_after(uuid, seq, limit=PAGE) for seq in groups))
        if groups and not self._ledger.exclusive:
            # Another process may have trimmed the log before the pages were read: they would lack deletions.
            self._find_trimmed(await self._ledger.state(uuid))
            if self._ledger.epoch != epoch:
                return True
        began_again = [slot for slot in idle if slot.lost or slot.shard is None]
        started = [self._start(slot, self._open_shard(slot, again=slot.lost)) for slot in began_again]
        for group, page in zip(groups.values(), pages, strict=True):
            reached = page[-1].seq if len(page) == PAGE else max(state.seq, page[-1].seq if page else 0)
            parts = self._partition(page)
            started += [
                self._start(slot, self._apply(slot, shard, parts[slot.number], reached))
                for slot, shard in group
                if not slot.lost
            ]
        if started:
            _, late = await asyncio.wait(started, timeout=PATIENCE_S)
            for task in late:
                task.add_done_callback(lambda _: self._wake.set())
        return bool(began_again) or any(len(page) == PAGE for page in pages)

    async def _look(self) -> CollectionState:
        """Read where the ledger stands, and find the shards whose history is not (any more) the ledger's."""
        epoch, uuid = self._ledger.epoch, self.collection.uuid
        state = await self._ledger.state(uuid)
        for slot in self.slots.values():
            if slot.busy or slot.shard is None or slot.lost:
                continue
            if not slot.checked or slot.epoch != epoch:
                seq = slot.applied_seq
                slot.lost = seq > 0 and not (
                    slot.epoch is not None and await self._ledger.shares_history(uuid, slot.epoch, seq)
                )
                slot.epoch, slot.checked = epoch, True
                slot.target = state.seq if slot.target is None else min(slot.target, state.seq)
            slot.lost = slot.lost or slot.applied_seq > state.seq
            if slot.lost or state.seq - slot.applied_seq > FAR_BEHIND:
                slot.target = state.seq
        self._find_trimmed(state)
        return state

    def _find_trimmed(self, state: CollectionState) -> None:
        for slot in self.slots.values():
            if slot.shard is not None and not slot.busy and 0 < slot.applied_seq < state.trimmed_seq:
                slot.lost, slot.target = True, state.seq

    async def _pause(self) -> None:
        """Wait for news, the next poll or the next retry."""
        now = _now()
        retries = [slot.retry_at - now for slot in self.slots.values() if slot.failure is not None and not slot.busy]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min([self._poll_s, *retries]))):
                await self._wake.wait()

    def _partition(self, page: Sequence[Operation]) -> dict[int, list[Operation]]:
        parts: dict[int, list[Operation]] = {number: [] for number in self.slots}
        for operation in page:
            part = parts.get(shard_of(operation.id, self.collection.shards))
            if part is not None:
                part.append(operation)
        return parts

    def _hosted(self) -> str:
        return f"it has {', '.join(map(str, self.slots)) or 'none of them'}; do the nodes agree on how many they are?"

    # --- one shard

    def _start(self, slot: Slot, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        slot.busy = True

        def finish(task: asyncio.Task[None]) -> None:
            slot.busy = False
            self._working.discard(task)
            self._answer_waiting()

        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(finish)
        return task

    async def _open_shard(self, slot: Slot, *, again: bool = False) -> None:
        """Open the shard; *again* is from nothing, in the place of one whose history is not the ledger's."""
        if slot.shard is not None:
            _log.warning("shard_begins_again", collection=self.collection.name, shard=slot.number, epoch=slot.epoch)
            old, slot.shard = slot.shard, None
            await self._close_shard(old)
        try:
            shard = await asyncio.to_thread(self._open, self.collection, slot.number, not again)
        except Exception as error:
            self._note_failure(slot, "the shard could not be opened", error)
            return
        if self._closed:
            await self._close_shard(shard)
            return
        for problem in shard.problems:
            _log.warning("shard_damaged", collection=self.collection.name, shard=slot.number, problem=problem)
        slot.take(shard)

    async def _apply(self, slot: Slot, shard: LocalShard, operations: Sequence[Operation], seq: int) -> None:
        try:
            await shard.apply(operations, seq)
            if shard.applied_seq < seq:
                raise RuntimeError(f"it stands at {shard.applied_seq} after an apply up to {seq}")
        except Exception as error:
            self._note_failure(slot, "the shard cannot take new operations", error)
        else:
            slot.worked()
            if operations:
                self.changed_at = _now()

    async def _close_shard(self, shard: LocalShard) -> None:
        try:
            async with asyncio.timeout(GRACE_S):
                await shard.aclose()
        except Exception as error:
            _log.warning("shard_not_closed", collection=self.collection.name, shard=shard.number, error=repr(error))

    def _note_failure(self, slot: Slot, what: str, error: Exception) -> None:
        slot.failed(what, error)
        _log.warning(
            "shard_failed",
            collection=self.collection.name,
            shard=slot.number,
            what=what,
            attempt=slot.attempts,
            exc_info=error,
        )

    def _answer_waiting(self) -> None:
        for number, seq, future in self._waiting:
            if seq <= self.slots[number].applied_seq and not future.done():
                future.set_result(True)


def _now() -> float:
    return asyncio.get_running_loop().time()
