"""Keeps the shards of one collection true to the ledger: one task that tails the operations, page by page."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import structlog

from services.common.errors import NotFound, TercetError
from services.search.ports import Collection, Ledger, Operation, Shard

MakeShard = Callable[[Collection, int], Shard]

PAGE = 512
PATIENCE_S = 2.0  # how long a page waits for its slowest shard before the others go on without it
GRACE_S = 10.0  # how long closing waits for work under way
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 30.0

_log = structlog.get_logger(__name__)


def shard_of(document_id: str, shards: int) -> int:
    """Return the number of the shard, of *shards*, that holds *document_id*; the same for ever and everywhere."""
    digest = blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % shards


def describe(error: BaseException) -> str:
    """Return what a caller may read about *error*; the log has the rest."""
    return error.message if isinstance(error, TercetError) else type(error).__name__


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one shard: the shard, or why it could not be opened; *failure* is why it fell behind, if it did."""

    number: int
    shard: Shard | None = None
    failure: str | None = None
    attempts: int = 0
    retry_at: float = 0.0
    busy: bool = False

    def failed(self, what: str, error: Exception) -> None:
        """Note that *what* failed, and put the next attempt off, twice as long each time."""
        self.failure = f"{what}: {describe(error)}"
        self.retry_at = _now() + min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.attempts, 20))
        self.attempts += 1

    def worked(self) -> None:
        """Note that the last attempt went well."""
        self.failure, self.attempts, self.retry_at = None, 0, 0.0


class Follower:
    """
    The shards of one collection and the task that applies the ledger's operations to them.

    Shards that stand at the same operation share a page. One whose `apply` raises is retried with back-off, and one
    that is behind or slow reads pages of its own until it has met the others, so that none holds the others up.
    """

    def __init__(self, ledger: Ledger, collection: Collection, make_shard: MakeShard, *, poll_s: float) -> None:
        """Follow *collection*; *make_shard* is called in a thread, as it may read files."""
        self.slots = tuple(Slot(number) for number in range(collection.shards))
        self._ledger = ledger
        self._collection = collection
        self._make_shard = make_shard
        self._poll_s = poll_s
        self._seq_at_open: int | None = None
        self._wake = asyncio.Event()
        self._waiting: set[tuple[int, asyncio.Future[bool]]] = set()
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
        await asyncio.gather(*(self._open_shard(slot) for slot in self.slots))
        try:
            await self._read_seq_at_open()
        except NotFound:
            await self.aclose()
            raise
        except Exception as error:
            _log.warning("ledger_unreadable", collection=self._collection.name, error=repr(error))
        self._task = asyncio.create_task(self._follow())

    @property
    def applied_seq(self) -> int:
        """The last operation that every shard has applied."""
        return min(slot.shard.applied_seq if slot.shard else 0 for slot in self.slots)

    def catching_up(self, applied_seq: int) -> bool:
        """Whether a shard at *applied_seq* still lacks operations that were in the ledger when this opened."""
        return self._seq_at_open is None or applied_seq < self._seq_at_open

    def notify(self, seq: int) -> None:
        """Look at the ledger at once, if *seq* is news."""
        if seq > self.applied_seq:
            self._wake.set()

    async def wait_applied(self, seq: int, timeout_s: float | None) -> bool:
        """Wait until every shard has applied *seq*; False when *timeout_s* or the closing came first."""
        if self.applied_seq >= seq:
            return True
        if self._closed:
            return False
        self._wake.set()
        waiting = (seq, asyncio.get_running_loop().create_future())
        self._waiting.add(waiting)
        try:
            await asyncio.wait({waiting[1]}, timeout=timeout_s)
            return waiting[1].done() and waiting[1].result()
        finally:
            self._waiting.discard(waiting)

    async def aclose(self) -> None:
        """Stop following and close the shards; what hangs is given up after a while. Closing twice does no harm."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for _, future in self._waiting:
            if not future.done():
                future.set_result(False)
        if self._working:
            _, late = await asyncio.wait(self._working, timeout=GRACE_S)
            for task in late:
                task.cancel()
        shards = [slot.shard for slot in self.slots if slot.shard is not None]
        for slot in self.slots:
            slot.shard = None
        await asyncio.gather(*map(self._close_shard, shards))

    # --- following

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            try:
                more = await self._round()
                self._ledger_failures = 0
            except Exception as error:
                _log.warning("following_failed", collection=self._collection.name, error=repr(error))
                await asyncio.sleep(min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._ledger_failures, 20)))
                self._ledger_failures += 1
                continue
            if not more:
                await self._pause()

    async def _round(self) -> bool:
        """Take each idle shard one page on; True when there is more to do at once."""
        if self._seq_at_open is None:
            await self._read_seq_at_open()
        idle = [slot for slot in self.slots if not slot.busy and slot.retry_at <= _now()]
        unopened = [slot for slot in idle if slot.shard is None]
        groups: dict[int, list[tuple[Slot, Shard]]] = {}
        for slot in idle:
            if slot.shard is not None:
                groups.setdefault(slot.shard.applied_seq, []).append((slot, slot.shard))
        uuid = self._collection.uuid
        pages = await asyncio.gather(*(self._ledger.operations_after(uuid, seq, limit=PAGE) for seq in groups))
        started = [self._start(slot, self._open_shard(slot)) for slot in unopened]
        for group, page in zip(groups.values(), pages, strict=True):
            if page:
                parts = self._partition(page)
                started += [
                    self._start(slot, self._apply(slot, shard, parts[slot.number], page[-1].seq))
                    for slot, shard in group
                ]
        if started:
            _, late = await asyncio.wait(started, timeout=PATIENCE_S)
            for task in late:
                task.add_done_callback(lambda _: self._wake.set())
        return bool(unopened) or any(len(page) == PAGE for page in pages)

    async def _pause(self) -> None:
        """Wait for news, the next poll or the next retry."""
        now = _now()
        retries = [slot.retry_at - now for slot in self.slots if slot.failure is not None and not slot.busy]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min([self._poll_s, *retries]))):
                await self._wake.wait()

    def _partition(self, page: Sequence[Operation]) -> list[list[Operation]]:
        parts: list[list[Operation]] = [[] for _ in self.slots]
        for operation in page:
            parts[shard_of(operation.id, len(parts))].append(operation)
        return parts

    async def _read_seq_at_open(self) -> None:
        self._seq_at_open = (await self._ledger.state(self._collection.uuid)).seq

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

    async def _open_shard(self, slot: Slot) -> None:
        try:
            shard = await asyncio.to_thread(self._make_shard, self._collection, slot.number)
        except Exception as error:
            self._note_failure(slot, "the shard could not be opened", error)
            return
        if self._closed:
            await self._close_shard(shard)
            return
        slot.shard = shard
        slot.worked()

    async def _apply(self, slot: Slot, shard: Shard, operations: Sequence[Operation], seq: int) -> None:
        try:
            await shard.apply(operations, seq)
            if shard.applied_seq < seq:
                raise RuntimeError(f"it stands at {shard.applied_seq} after an apply up to {seq}")
        except Exception as error:
            self._note_failure(slot, "the shard cannot take new operations", error)
        else:
            slot.worked()

    async def _close_shard(self, shard: Shard) -> None:
        try:
            async with asyncio.timeout(GRACE_S):
                await shard.aclose()
        except Exception as error:
            _log.warning("shard_not_closed", collection=self._collection.name, shard=shard.number, error=repr(error))

    def _note_failure(self, slot: Slot, what: str, error: Exception) -> None:
        slot.failed(what, error)
        _log.warning(
            "shard_failed",
            collection=self._collection.name,
            shard=slot.number,
            what=what,
            attempt=slot.attempts,
            exc_info=error,
        )

    def _answer_waiting(self) -> None:
        applied = self.applied_seq
        for seq, future in self._waiting:
            if seq <= applied and not future.done():
                future.set_result(True)


def _now() -> float:
    return asyncio.get_running_loop().time()
