"""The one thread that a model runs in: takes batches, isolates what fails, and is watched."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import structlog

from services.common.batching.cost import CostModel
from services.common.batching.engine import BatchObservation, Engine
from services.common.batching.queue import Lane, LaneQueues
from services.common.batching.submission import Work
from services.common.batching.turn import DeviceTurn
from services.common.errors import BackendFailed, NotReady, OutOfMemory, TercetError

log = structlog.get_logger(__name__)

# While queries arrive, a bulk batch is kept about this short: a query that comes in the middle waits for at most the rest
# of it, and 25 ms leave 15 ms of a 40 ms objective for the query's own batch, HTTP and a batch that takes longer than
# predicted. Shorter would cost bulk work more: a batch's fixed cost (some 2.5 ms for a small encoder on a CPU) is 10 % of 25 ms,
# beside 6 % of the batches it has without queries, and would be 20 % of half as much.
BULK_BATCH_S = 0.025
QUERY_QUIET_S = 1.0  # Queries "arrive" for this long after the last one.
WATCH_EVERY_S = 0.5

Deliver = Callable[[list[Work], Sequence[Any], float, float], None]
Fail = Callable[[list[Work], Exception], None]


class Worker:
    """
    Runs *engine* in a thread of its own, for as long as it is well.

    *deliver*, *fail* and *broken* are called in that thread, and must return at once. Hold `changed` while using `queues`.
    """

    def __init__(
        self,
        engine: Engine[Any, Any, Any],
        queues: LaneQueues,
        cost: CostModel,
        *,
        max_batch_tokens: int,
        hang_s: float,
        turn: DeviceTurn,
        deliver: Deliver,
        fail: Fail,
        broken: Callable[[], None],
    ) -> None:
        self.queues = queues
        self.changed = threading.Condition()
        self.failure: str | None = None
        self.stopping = False
        self.last_query_at = -QUERY_QUIET_S
        self.observe: Callable[[BatchObservation], None] = lambda _batch: None
        self._engine = engine
        self._pads: bool = getattr(engine, "pads", True)
        self._cost = cost
        self._hang_s = hang_s
        self._turn = turn
        self._deliver, self._fail, self._broken = deliver, fail, broken
        self._max_batch_tokens = max_batch_tokens
        self._memory_tokens = max_batch_tokens  # Falls when the device runs out of memory, and creeps up again.
        self._idle = False
        self._running: tuple[float, float] | None = None  # Since when, and how many seconds it should take.
        self._measured: deque[list[Work]] = deque()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._watchdog: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the thread, and its watchdog in the running event loop."""
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch())

    def wake(self) -> None:
        """Have the thread look at the queues; call it holding `changed`."""
        if self._idle:
            self._idle = False
            self.changed.notify()

    def measure(self, batch: list[Work]) -> None:
        """Run exactly *batch* next; the cost model does not learn from it, and nobody is told of it."""
        with self.changed:
            self._measured.append(batch)
            self.wake()

    def batch_budget_tokens(self) -> int:
        """Return how many padded tokens a batch may have now."""
        return min(self._memory_tokens, self._cost.budget_tokens(self._max_batch_tokens))

    def remaining_s(self) -> float:
        """Return how much longer the running batch is expected to take; 0 when none runs."""
        running = self._running
        return max(0.0, running[0] + running[1] - time.monotonic()) if running else 0.0

    def stop(self) -> None:
        """Have the thread end after what is queued."""
        with self.changed:
            self.stopping = True
            self.wake()
        if self._watchdog is not None:
            self._watchdog.cancel()

    def join(self) -> None:
        """Wait until the thread has ended, for as long as a batch may take."""
        if self._thread.is_alive():
            self._thread.join(self._hang_s)

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self._turn.acquire()
                try:
                    lane, batch = self._take()
                    if batch:
                        self._run(lane, batch)
                finally:
                    self._running = None
                    self._turn.release()
        except NotReady as error:  # The device was given up, by whoever shares it.
            self._break(error.message)
        except BaseException as error:
            log.error("inference_worker_died", exc_info=error)
            self._break(f"The inference worker died: {error!r}")
            raise

    def _wait_for_work(self) -> bool:
        with self.changed:
            while not len(self.queues) and not self._measured:
                if self.stopping:
                    return False
                self._idle = True
                self.changed.wait()
            self._idle = False
            return True

    def _take(self) -> tuple[Lane, list[Work]]:
        with self.changed:
            if self._measured:
                return Lane.QUERY, self._measured.popleft()
            queries_arrive = time.monotonic() - self.last_query_at < QUERY_QUIET_S
            lane, batch = self.queues.next_batch(
                max_tokens=self.batch_budget_tokens(),
                bulk_fits=self._fits_bulk_slice if queries_arrive else None,
                predict=self._cost.predict_s if self._cost.ready else None,
            )
            works = cast(list[Work], batch)
            for work in works:
                work.running = True
            return lane, works

    def _fits_bulk_slice(self, items: int, longest: int) -> bool:
        return self._cost.predict_s(items, longest) <= BULK_BATCH_S

    def _run(self, lane: Lane, batch: list[Work]) -> None:
        items, longest = self._size(batch)
        started = time.monotonic()
        self._running = started, self._cost.predict_s(items, longest)
        try:
            outputs = self._engine.run([work.prepared for work in batch])
            if len(outputs) != len(batch):
                raise BackendFailed(f"The model gave {len(outputs)} outputs for {len(batch)} items")
        except Exception as error:
            self._isolate(lane, batch, error)
            return
        seconds = time.monotonic() - started
        self._deliver(batch, outputs, started, seconds)
        if batch[0].measured:
            return
        self._cost.observe(items, longest, seconds)
        self._memory_tokens = min(self._max_batch_tokens, self._memory_tokens + self._memory_tokens // 1024 + 1)
        tokens = sum(work.tokens for work in batch)
        waits_s = [started - work.queued_at for work in batch]
        try:
            self.observe(BatchObservation(lane, len(batch), tokens, items * longest, seconds, waits_s))
        except Exception as error:
            log.error("batch_observer_failed", exc_info=error)

    def _size(self, batch: list[Work]) -> tuple[int, int]:
        """Return how many items of the longest length *batch* amounts to, and that length in tokens."""
        longest = batch[-1].tokens
        if self._pads or not longest:
            return len(batch), longest
        return -(-sum(work.tokens for work in batch) // longest), longest

    def _isolate(self, lane: Lane, batch: list[Work], error: Exception) -> None:
        """Run *batch*, which failed, in halves; an item that fails alone fails those who want it."""
        if isinstance(error, MemoryError):
            error = OutOfMemory("There is no memory for this input now")
        if len(batch) > 1:
            middle = len(batch) // 2
            if isinstance(error, OutOfMemory):
                self._memory_tokens = max(1, len(batch) * batch[-1].tokens // 2)
                log.warning("out_of_memory", items=len(batch), batch_tokens=self._memory_tokens)
            self._run(lane, batch[:middle])
            self._run(lane, batch[middle:])
            return
        log.error("inference_failed", exc_info=error)
        failed = BackendFailed(f"The model failed: {type(error).__name__}")
        self._fail(batch, error if isinstance(error, TercetError) else failed)

    def _break(self, reason: str) -> None:
        """Fail everybody now, and refuse everybody from now on."""
        with self.changed:
            self.failure = self.failure or reason
            self.queues.clear()
        self._broken()

    async def _watch(self) -> None:
        """Declare the worker dead when one batch takes longer than any batch may; waiting for the device does not count."""
        while not self.failure:
            await asyncio.sleep(min(WATCH_EVERY_S, self._hang_s / 4))
            running = self._running
            if running is not None and time.monotonic() - running[0] > self._hang_s:
                log.error("inference_worker_hangs", seconds=round(time.monotonic() - running[0], 1))
                reason = f"The inference worker has hung for over {self._hang_s:.0f} s"
                self._turn.give_up(reason)
                self._break(reason)
