"""One inference worker that concurrent callers share: see the package's docstring for the path of an item."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog

from services.common.batching.queue import Entry, Lane, LaneQueues, Ticket
from services.common.deadline import Deadline
from services.common.errors import BackendFailed, DeadlineExceeded, NotReady, Overloaded, TercetError

log = structlog.get_logger(__name__)

Item = TypeVar("Item", contravariant=True)
Prepared = TypeVar("Prepared")
Output = TypeVar("Output", covariant=True)
ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")

PREPARE_CHUNK = 128  # Items a tokenizer thread takes at a time, so that large submissions do not hold it for long.
BULK_BATCH_S = 0.025  # While queries arrive, a bulk batch is kept about this short.
QUERY_QUIET_S = 1.0  # Queries "arrive" for this long after the last one.
WATCH_EVERY_S = 0.5


class Engine(Protocol[Item, Prepared, Output]):
    """What is batched: a model with its tokenizer. Methods run in threads; `run` always in the same one."""

    def prepare(self, items: Sequence[Item]) -> Sequence[Prepared]:
        """Tokenise *items*; one result each, in order."""
        ...

    def tokens(self, prepared: Prepared) -> int:
        """Return how many tokens the model will read for one prepared item."""
        ...

    def run(self, batch: Sequence[Prepared]) -> Sequence[Output]:
        """Return one output for each prepared item, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Submission(Generic[OutputT]):
    """Outputs in the order of the items (None where the deadline came first), and where the time went."""

    outputs: list[OutputT | None]
    tokenization_ms: float
    queue_ms: float
    inference_ms: float


@dataclass(frozen=True, slots=True)
class BatchObservation:
    """What one batch was, for metrics. *padded_tokens* counts what the model computed, *tokens* what was asked."""

    lane: Lane
    items: int
    tokens: int
    padded_tokens: int
    seconds: float


class _Job(Ticket, Generic[OutputT]):
    """A submission under way; touched from the event loop only, except for the ticket's flags."""

    __slots__ = ("done", "inference_s", "outputs", "queue_s", "remaining", "tokenization_s")

    def __init__(self, size: int, deadline: Deadline, done: "asyncio.Future[None]") -> None:
        super().__init__(deadline.at)
        self.outputs: list[OutputT | None] = [None] * size
        self.remaining = size
        self.done = done
        self.tokenization_s = 0.0
        self.queue_s = 0.0
        self.inference_s = 0.0

    def fail(self, error: Exception) -> None:
        self.abandoned = True
        if not self.done.done():
            self.done.set_exception(error)


class Batcher(Generic[ItemT, OutputT]):
    """
    Shares *engine* between concurrent callers. `start` it in the event loop that submits, `aclose` it at the end.

    The worker never waits for a batch to fill: when it is idle, whatever is there goes.
    A batch that raises is halved until the guilty item is alone, so that only its caller fails.
    """

    def __init__(
        self,
        engine: Engine[ItemT, Prepared, OutputT],
        *,
        max_batch_tokens: int = 16_384,
        max_batch_items: int = 128,
        max_queue_items: int = 8_192,
        sort_window: int = 512,
        tokenizer_threads: int = 1,
        hang_s: float = 60.0,
    ) -> None:
        self._engine: Engine[ItemT, object, OutputT] = engine  # type: ignore[assignment]
        self._queues = LaneQueues(
            max_batch_tokens=max_batch_tokens, max_batch_items=max_batch_items, sort_window=sort_window
        )
        self._max_queue_items = max_queue_items
        self._hang_s = hang_s
        self.observe: Callable[[BatchObservation], None] = lambda _batch: None
        self._tokenizers = ThreadPoolExecutor(tokenizer_threads, thread_name_prefix="tokenizer")
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: str | None = None
        self._busy_since: float | None = None
        self._last_query_at = -QUERY_QUIET_S
        self._tokens_per_s = 4_000.0
        self._admitted: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._jobs: set[_Job[OutputT]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
        self._watchdog: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the worker and its watchdog."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        self._watchdog = asyncio.create_task(self._watch())

    def depth(self, lane: Lane) -> int:
        """Return how many items of *lane* were admitted and have no result yet."""
        return self._admitted[lane]

    def problems(self) -> list[str]:
        """Return why this batcher cannot work any more; empty while it can."""
        return [self._failure] if self._failure else []

    async def submit(
        self, items: Sequence[ItemT], *, lane: Lane, deadline: Deadline, allow_partial: bool = False
    ) -> Submission[OutputT]:
        """
        Compute the outputs of *items*, sharing batches with concurrent callers.

        With *allow_partial* a deadline that passes leaves None where no output was ready; items were taken roughly in
        the order given. Cancelling drops what is still queued.

        Raises:
            Overloaded: The lane's queue is full; nothing was done.
            DeadlineExceeded: Time ran out (without *allow_partial*).
            BackendFailed: The model raised on one of these items.
            NotReady: The worker is dead, or stopping.
        """
        self._check_working()
        if self._admitted[lane] + len(items) > self._max_queue_items:
            raise Overloaded(f"The {lane} queue is full ({self._max_queue_items:,} items); retry in a moment")
        assert self._loop is not None, "start() comes first"
        job: _Job[OutputT] = _Job(len(items), deadline, self._loop.create_future())
        self._admitted[lane] += len(items)
        self._jobs.add(job)
        try:
            timeout_s = None if deadline.at == float("inf") else max(0.0, deadline.remaining_s())
            async with asyncio.timeout(timeout_s):
                await self._prepare(job, items, lane)
                if items:
                    await job.done
        except TimeoutError:
            if not allow_partial:
                raise DeadlineExceeded("The time allowed for this request ran out before the model got to it") from None
        finally:
            self._leave(job, lane, len(items))
        # A copy: a batch that was running at the deadline still delivers.
        return Submission(list(job.outputs), job.tokenization_s * 1000, job.queue_s * 1000, job.inference_s * 1000)

    def _check_working(self) -> None:
        if self._failure or self._stopping:
            raise NotReady(self._failure or "The service is stopping")

    async def _prepare(self, job: _Job[OutputT], items: Sequence[ItemT], lane: Lane) -> None:
        """Tokenise in chunks and queue each chunk as soon as it is ready."""
        assert self._loop is not None
        started = time.monotonic()
        for start in range(0, len(items), PREPARE_CHUNK):
            chunk = items[start : start + PREPARE_CHUNK]
            prepared = await self._loop.run_in_executor(self._tokenizers, self._engine.prepare, chunk)
            entries = [Entry(job, start + i, one, self._engine.tokens(one)) for i, one in enumerate(prepared)]
            with self._changed:
                self._check_working()
                self._queues.extend(lane, entries)
                if lane is Lane.QUERY:
                    self._last_query_at = time.monotonic()
                self._changed.notify()
            job.tokenization_s = time.monotonic() - started

    def _leave(self, job: _Job[OutputT], lane: Lane, size: int) -> None:
        job.abandoned = True
        self._jobs.discard(job)
        self._admitted[lane] -= size
        if job.remaining:
            with self._changed:
                self._queues.drop(job)
        job.done.cancel()

    # --- the worker thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (taken := self._take()) is not None:
                self._busy_since = time.monotonic()
                self._run(*taken)
                self._busy_since = None
        except BaseException as error:
            log.error("inference_worker_died", exc_info=error)
            self._break(f"The inference worker died: {error!r}")
            raise

    def _take(self) -> tuple[Lane, list[Entry]] | None:
        """Wait for a batch; None when it is time to stop."""
        with self._changed:
            while True:
                while not len(self._queues):
                    if self._stopping:
                        return None
                    self._changed.wait()
                lane, batch = self._queues.next_batch(bulk_budget_tokens=self._bulk_budget_tokens())
                if batch:
                    return lane, batch

    def _bulk_budget_tokens(self) -> int:
        if time.monotonic() - self._last_query_at > QUERY_QUIET_S:
            return 1 << 30
        return int(self._tokens_per_s * BULK_BATCH_S)

    def _run(self, lane: Lane, batch: list[Entry]) -> None:
        started = time.monotonic()
        try:
            outputs = self._engine.run([entry.prepared for entry in batch])
        except Exception as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                self._run(lane, batch[:middle])
                self._run(lane, batch[middle:])
                return
            log.error("inference_failed", exc_info=error)
            failure = (
                error if isinstance(error, TercetError) else BackendFailed(f"The model failed: {type(error).__name__}")
            )
            self._call_soon(batch[0].ticket.fail, failure)
            return
        seconds = time.monotonic() - started
        padded = batch[-1].tokens * len(batch)
        self._tokens_per_s += 0.2 * (padded / max(seconds, 1e-6) - self._tokens_per_s)
        self.observe(BatchObservation(lane, len(batch), sum(entry.tokens for entry in batch), padded, seconds))
        self._call_soon(self._deliver, batch, outputs, started, seconds)

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(callback, *args)

    # --- back in the event loop ----------------------------------------------------------------------------------

    def _deliver(self, batch: list[Entry], outputs: Sequence[OutputT], started: float, seconds: float) -> None:
        for job in {id(entry.ticket): entry.ticket for entry in batch}.values():
            job.inference_s += seconds
        for entry, output in zip(batch, outputs, strict=True):
            job = entry.ticket
            job.outputs[entry.position] = output
            job.queue_s = max(job.queue_s, started - entry.queued_at)
            job.remaining -= 1
            if job.remaining == 0 and not job.done.done():
                job.done.set_result(None)

    def _break(self, reason: str) -> None:
        """Fail every waiter now, and every caller from now on."""
        with self._changed:
            self._failure = self._failure or reason
            self._queues.clear()
        self._call_soon(self._fail_all)

    def _fail_all(self) -> None:
        for job in list(self._jobs):
            job.fail(NotReady(self._failure or "The inference worker is gone"))

    async def _watch(self) -> None:
        """Declare the worker dead when one batch takes longer than any batch may."""
        while not self._failure:
            await asyncio.sleep(min(WATCH_EVERY_S, self._hang_s / 4))
            busy_since = self._busy_since
            if busy_since is not None and time.monotonic() - busy_since > self._hang_s:
                log.error("inference_worker_hangs", seconds=round(time.monotonic() - busy_since, 1))
                self._break(f"The inference worker has hung for over {self._hang_s:.0f} s")

    async def aclose(self) -> None:
        """Stop the worker after what is queued; later submissions are refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._loop is not None and not self._failure:
            await self._loop.run_in_executor(None, self._worker.join, self._hang_s)
        self._tokenizers.shutdown(wait=False, cancel_futures=True)
