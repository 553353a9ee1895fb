"""A stream of documents into a collection: batch after batch, no faster than they can be stored, in bounded memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from services.common.deadline import Deadline
from services.common.errors import Overloaded, TercetError, Unavailable
from services.common.wire.documents import MAX_REPORTED_ERRORS, DocumentError
from services.search.documents import Draft
from services.search.indexing import Indexing, Outcome, Prepared
from services.search.ports import Collection
from services.search.receipts import IdempotencyKey
from services.search.streams import Arrived

BATCH_DOCUMENTS = 256
BATCH_BYTES = 4 * 1024 * 1024
BATCHES_IN_FLIGHT = 3  # One is embedded, one stored and one read: more would only hold memory.
RETRY_FIRST_S = 0.25
RETRY_LONGEST_S = 4.0


@dataclass(slots=True)
class Totals:
    """
    What a stream has written so far, under operation numbers up to *seq*; *errors* are the first 1,000.

    *collection* is None until a document was valid. *error* is what ended the stream before its end.
    """

    collection: Collection | None = None
    accepted: int = 0
    unchanged: int = 0
    embedded: int = 0
    failed: int = 0
    batches: int = 0
    seq: int = 0
    applied: bool = False
    errors: list[DocumentError] = field(default_factory=list)
    error: TercetError | None = None

    def add(self, collection: Collection | None, outcome: Outcome) -> None:
        """Count one more batch."""
        self.collection = collection or self.collection
        self.accepted += outcome.accepted
        self.unchanged += outcome.unchanged
        self.embedded += outcome.embedded
        self.failed += len(outcome.errors)
        self.batches += 1
        self.seq = max(self.seq, outcome.seq)
        self.errors += outcome.errors[: max(0, MAX_REPORTED_ERRORS - len(self.errors))]


@dataclass(slots=True)
class _Batch:
    """Documents that are stored together: ids once each. *raw* is what they came as, for the digest of a key."""

    number: int
    items: list[Draft | DocumentError] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    raw: list[bytes] = field(default_factory=list)
    size: int = 0

    @property
    def full(self) -> bool:
        return len(self.items) >= BATCH_DOCUMENTS or self.size >= BATCH_BYTES

    def add(self, arrived: Arrived) -> None:
        self.items.append(arrived.item)
        self.raw.append(arrived.raw)
        self.size += arrived.size
        if isinstance(arrived.item, Draft):
            self.ids.add(arrived.item.id)


class Ingest:
    """Writes streams. Of several batches at once the embedding overlaps; they are stored one after the other, in order."""

    def __init__(self, indexing: Indexing) -> None:
        self._indexing = indexing

    async def run(
        self,
        name: str,
        arriving: AsyncIterator[list[Arrived]],
        deadline: Callable[[], Deadline],
        *,
        wait: bool,
        key: str | None = None,
        on_batch: Callable[[Totals], None] | None = None,
    ) -> Totals:
        """
        Store what arrives until it ends or cannot be read; *arriving* is not asked for more while three batches wait.

        *deadline* makes the deadline of a batch. A document replaces an earlier one of its id, as if they were written
        one by one. Under an idempotency *key* the batches of a repeated stream that were stored are passed over, since
        the same documents make the same batches. What a retry may mend is tried again until the batch's deadline. With
        *wait*, returns once searches see the last. *on_batch* is told the totals after each batch.

        The totals' `error` says why the stream ended early; the batches that were stored until then stay. Cancelling
        stores no more.
        """
        totals = Totals()
        flight = _Flight(self._indexing, name, deadline, key, totals, on_batch)
        try:
            try:
                async for batch in _batches(arriving):
                    await flight.start(batch)
            except TercetError as error:
                totals.error = error
            try:
                await flight.finish()
            except TercetError as error:
                totals.error = totals.error or error
        finally:
            await flight.stop()
        if wait and totals.error is None and totals.collection is not None:
            totals.applied = await self._indexing.applied(totals.collection, totals.seq, deadline())
        return totals


class _Flight:
    """The batches of one stream that are under way, the oldest first."""

    def __init__(
        self,
        indexing: Indexing,
        name: str,
        deadline: Callable[[], Deadline],
        key: str | None,
        totals: Totals,
        on_batch: Callable[[Totals], None] | None,
    ) -> None:
        self._indexing = indexing
        self._name = name
        self._deadline = deadline
        self._key = key
        self._totals = totals
        self._on_batch = on_batch
        self._under_way: list[tuple[set[str], asyncio.Task[None]]] = []

    async def start(self, batch: _Batch) -> None:
        """Begin *batch* once there is room, and no batch under way holds one of its ids or makes the collection."""
        while self._under_way and (
            len(self._under_way) >= BATCHES_IN_FLIGHT
            or self._totals.batches == 0
            or not all(batch.ids.isdisjoint(ids) for ids, _ in self._under_way)
        ):
            await self._oldest()
        before = self._under_way[-1][1] if self._under_way else None
        self._under_way.append((batch.ids, asyncio.create_task(self._write(batch, before))))

    async def finish(self) -> None:
        """Wait for all of them. Raises what the first that failed raised."""
        while self._under_way:
            await self._oldest()

    async def stop(self) -> None:
        """Cancel what is under way, and wait until it has stopped."""
        tasks = [task for _, task in self._under_way]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _oldest(self) -> None:
        await asyncio.wait({self._under_way[0][1]})
        _, task = self._under_way.pop(0)
        task.result()

    async def _write(self, batch: _Batch, before: asyncio.Task[None] | None) -> None:
        deadline = self._deadline()
        key = None if self._key is None else IdempotencyKey.of(f"{self._key}/{batch.number}", batch.raw)
        prepared = await self._prepare(batch, deadline, key)
        if before is not None:
            await asyncio.wait({before})
            if before.cancelled() or before.exception() is not None:
                return  # The stream ends there.
        if isinstance(prepared, Outcome):
            self._totals.add(None, prepared)
        else:
            self._totals.add(prepared.collection, await self._commit(prepared, deadline))
        if self._on_batch is not None:
            self._on_batch(self._totals)

    async def _prepare(self, batch: _Batch, deadline: Deadline, key: IdempotencyKey | None) -> Prepared | Outcome:
        pause = _Pause(deadline)
        while True:
            try:
                return await self._indexing.prepare(self._name, batch.items, deadline, key=key)
            except (Overloaded, Unavailable) as error:
                await pause.after(error)

    async def _commit(self, prepared: Prepared, deadline: Deadline) -> Outcome:
        pause = _Pause(deadline)
        while True:
            try:
                return await self._indexing.commit(prepared)
            except Unavailable as error:
                await pause.after(error)


class _Pause:
    """The growing pauses between attempts, until a deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._next_s = RETRY_FIRST_S

    async def after(self, error: TercetError) -> None:
        """Wait before the next attempt; raises *error* where there is no time for one."""
        pause_s = max(self._next_s, error.retry_after_s or 0.0)
        if self._deadline.remaining_s() < pause_s:
            raise error
        await asyncio.sleep(pause_s)
        self._next_s = min(2 * self._next_s, RETRY_LONGEST_S)


async def _batches(arriving: AsyncIterator[list[Arrived]]) -> AsyncIterator[_Batch]:
    """Yield what arrives in batches whose bounds follow from the documents alone, not from when they arrive."""
    batch = _Batch(0)
    async for several in arriving:
        for arrived in several:
            if batch.full or (isinstance(arrived.item, Draft) and arrived.item.id in batch.ids):
                yield batch
                batch = _Batch(batch.number + 1)
            batch.add(arrived)
    if batch.items:
        yield batch
