"""Writing any number of documents: batches a few at a time, in bounded memory, with patience for a busy service."""

import asyncio
import contextlib
import itertools
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import TypeVar, cast

from services.common.wire.base import ReplyModel
from services.common.wire.documents import Document, WriteReply
from services.common.wire.errors import ErrorBody
from tercet.errors import IndexingFailed, TercetApiError, TercetClientError, TercetUnreachable
from tercet.ingest import DocumentDict

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0

Batch = list[Document | DocumentDict]
T = TypeVar("T")


class IndexSummary(ReplyModel):
    """What `TercetClient.index` has written so far: *embedded* texts were seen by the model, *unchanged* ones skipped."""

    documents: int = 0
    unchanged: int = 0
    embedded: int = 0
    batches: int = 0
    seq: int = 0
    seconds: float = 0.0


class Indexing:
    """One call of `TercetClient.index`: its running totals, and the ids of the batches under way."""

    def __init__(
        self,
        write: Callable[[Batch], Awaitable[WriteReply]],
        *,
        concurrency: int,
        retry_for_s: float,
        on_batch: Callable[[IndexSummary], None] | None,
    ) -> None:
        self._write_batch = write
        self._concurrency = concurrency
        self._retry_for_s = retry_for_s
        self._on_batch = on_batch
        self._total = IndexSummary()
        self._under_way: list[set[str]] = []
        self._changed = asyncio.Condition()
        self._started = time.monotonic()

    async def run(self, batches: Iterator[Batch]) -> IndexSummary:
        try:
            async with asyncio.TaskGroup() as writes:
                while (batch := await _in_daemon_thread(lambda: next(batches, None))) is not None:
                    ids = {_id(document) for document in batch}
                    await self._wait_for_room(ids)
                    writes.create_task(self._write(batch, ids))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return self._total.model_copy(update={"seconds": time.monotonic() - self._started})

    async def _wait_for_room(self, ids: set[str]) -> None:
        """Wait until one more batch may be written, and none under way holds any of *ids*: the later must win."""

        def is_free() -> bool:
            return len(self._under_way) < self._concurrency and all(ids.isdisjoint(other) for other in self._under_way)

        async with self._changed:
            await self._changed.wait_for(is_free)
            self._under_way.append(ids)

    async def _write(self, batch: Batch, ids: set[str]) -> None:
        reply = await self._write_patiently(batch)
        if reply.errors:
            raise _refused(batch, reply)
        total = self._total
        self._total = IndexSummary(
            documents=total.documents + reply.accepted,
            unchanged=total.unchanged + reply.unchanged,
            embedded=total.embedded + reply.embedded,
            batches=total.batches + 1,
            seq=max(total.seq, reply.seq),
            seconds=time.monotonic() - self._started,
        )
        if self._on_batch:
            self._on_batch(self._total)
        async with self._changed:
            self._under_way.remove(ids)
            self._changed.notify_all()

    async def _write_patiently(self, batch: Batch) -> WriteReply:
        give_up_at = time.monotonic() + self._retry_for_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._write_batch(batch)
            except TercetUnreachable as error:
                if error.refused and self._total.batches == 0:
                    raise
                failure: TercetClientError = error
                wait_s = pause_s
            except TercetApiError as error:
                failure = error
                wait_s = max(pause_s, error.retry_after_s or 0.0) if error.retryable else float("inf")
            if time.monotonic() + wait_s > give_up_at:
                raise self._failed(batch, failure) from failure
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _failed(self, batch: Batch, error: TercetClientError) -> IndexingFailed:
        named = re.match(r"documents\.(\d+)", (error.param or "") if isinstance(error, TercetApiError) else "")
        at_fault = [_id(batch[int(named[1])])] if named and int(named[1]) < len(batch) else []
        return IndexingFailed(_id(batch[0]), _id(batch[-1]), at_fault, error)


def split_into_batches(documents: Iterable[Document | DocumentDict], size: int) -> Iterator[Batch]:
    """Yield *documents* in order in lists of up to *size*, each id at most once in a list."""
    batch: Batch = []
    ids: set[str] = set()
    for document in documents:
        if len(batch) == size or _id(document) in ids:
            yield batch
            batch, ids = [], set()
        batch.append(document)
        ids.add(_id(document))
    if batch:
        yield batch


def _refused(batch: Batch, reply: WriteReply) -> IndexingFailed:
    """Return the error of a batch of which some documents were left out, and the others written."""
    first = reply.errors[0]
    param = f"documents.{first.index}" + (f".{first.param}" if first.param else "")
    error = ErrorBody(code=first.code, message=first.message, type="invalid_request_error", param=param)
    at_fault = [_id(batch[error.index]) for error in reply.errors if error.index < len(batch)]
    return IndexingFailed(_id(batch[0]), _id(batch[-1]), at_fault, TercetApiError(422, error))


async def in_background(items: Iterable[T], size: int) -> AsyncIterator[list[T]]:
    """Yield *items* in lists of up to *size*, read in threads, so that a source that blocks holds up nobody."""
    source = iter(items)
    while several := await _in_daemon_thread(lambda: list(itertools.islice(source, size))):
        yield several


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Return what *work* does. Unlike asyncio's own threads, one that is blocked on standard input delays no exit."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(cast(T, result))

    def run() -> None:
        try:
            args: tuple[T | None, BaseException | None] = (work(), None)
        except BaseException as error:
            args = (None, error)
        # The loop is closed where nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, *args)

    threading.Thread(target=run, daemon=True, name="tercet-read").start()
    return await outcome


def _id(document: Document | DocumentDict) -> str:
    return document.id if isinstance(document, Document) else document["id"]
