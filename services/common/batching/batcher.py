"""One inference worker that concurrent callers share: see the package's docstring for the path of an item."""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from services.common.batching.calibration import calibrate
from services.common.batching.cost import CostModel
from services.common.batching.engine import BatchObservation, Engine, Prepared, Submission
from services.common.batching.preparation import Tokenizers
from services.common.batching.queue import Flow, Lane, LaneQueues
from services.common.batching.submission import Job, Work
from services.common.batching.turn import DeviceTurn
from services.common.batching.worker import Worker
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, NotReady, Overloaded

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")

HOPELESS = 2.0  # Work whose wait is predicted to be over so many times the time it has is refused at once.
NO_KEYS: Sequence[Hashable] = ()


class Batcher(Generic[ItemT, OutputT]):
    """
    Shares *engine* between concurrent callers. `start` it in the event loop that submits, `aclose` it at the end.

    The worker never waits for a batch to fill: when it is idle, whatever is there goes. Under load batches form by
    themselves, out of what came while the one before ran, as large as throughput asks for (see CostModel.budget_tokens).
    A batch that raises is halved until the guilty item is alone, so that only those who want it fail.
    Batchers whose models share a device are given the same *turn*.
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
        turn: DeviceTurn | None = None,
    ) -> None:
        self.cost = CostModel()
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_items = max_batch_items
        self._max_queue_items = max_queue_items
        self._queues = LaneQueues(
            max_batch_tokens=max_batch_tokens, max_batch_items=max_batch_items, sort_window=sort_window
        )
        self._worker = Worker(
            engine,
            self._queues,
            self.cost,
            max_batch_tokens=max_batch_tokens,
            hang_s=hang_s,
            turn=turn or DeviceTurn(),
            deliver=lambda *batch: self._call_soon(self._deliver, *batch),
            fail=lambda *failed: self._call_soon(self._fail, *failed),
            broken=lambda: self._call_soon(self._fail_all),
        )
        self._tokenizers = Tokenizers(engine, tokenizer_threads, self._enqueue, self._fail)
        self._admitted: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._mean_tokens = 32.0
        self._jobs: set[Job[OutputT]] = set()
        self._in_flight: dict[Hashable, Work] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # Is given each output that has a key, in the event loop, before its work is forgotten: who asks next finds one or other.
        self.keep: Callable[[Hashable, OutputT], None] = lambda _key, _output: None
        # Are told, in the event loop, how many seconds a chunk took to prepare, and how many items were under way already.
        self.observe_tokenised: Callable[[Lane, float], None] = lambda _lane, _seconds: None
        self.observe_coalesced: Callable[[Lane, int], None] = lambda _lane, _items: None

    @property
    def observe(self) -> Callable[[BatchObservation], None]:
        """Is told of each batch that went well, in the worker's thread."""
        return self._worker.observe

    @observe.setter
    def observe(self, callback: Callable[[BatchObservation], None]) -> None:
        self._worker.observe = callback

    async def start(self) -> None:
        """Start the worker and its watchdog."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    async def calibrate(self, make_item: Callable[[int], ItemT]) -> None:
        """
        Measure what batches cost, at warm-up: about a second, less if the model is slow.

        *make_item* returns an item of about so many tokens, a new one each time if the model remembers what it saw; one
        that is shorter, as a model's limit may have it, serves too.

        Raises:
            BackendFailed, InvalidInput, NotReady: What the engine or its worker raised; what was measured before is used.
        """
        await calibrate(
            self.cost,
            lambda count, tokens: self._measure([make_item(tokens) for _ in range(count)]),
            max_batch_tokens=self._max_batch_tokens,
            max_batch_items=self._max_batch_items,
        )

    def depth(self, lane: Lane) -> int:
        """Return how many items of *lane* were admitted and have no result yet."""
        return self._admitted[lane]

    def problems(self) -> list[str]:
        """Return why this batcher cannot work any more; empty while it can."""
        return [self._worker.failure] if self._worker.failure else []

    def estimated_wait_s(self, lane: Lane) -> float:
        """Return how long it should take until what *lane* holds now, and what goes before that, is done."""
        budget = self._worker.batch_budget_tokens()
        with self._worker.changed:
            loads = [self._queues.load(one) for one in Lane if one is lane or one is Lane.QUERY]
        return self._worker.remaining_s() + sum(self.cost.work_s(*load, budget) for load in loads)

    async def submit(
        self,
        items: Sequence[ItemT],
        *,
        lane: Lane,
        deadline: Deadline,
        allow_partial: bool = False,
        caller: str = "",
        keys: Sequence[Hashable] | None = None,
    ) -> Submission[OutputT]:
        """
        Compute the outputs of *items*, sharing batches with concurrent callers.

        *caller* is whose work it is: callers take turns in a lane. Items whose *keys*, one each, are equal have the same
        output: it is computed once for everybody who waits for it, and stays wanted until the last of them leaves.
        With *allow_partial* a deadline that passes leaves None where no output was ready; items were taken roughly in
        the order given. Cancelling drops what is still queued.

        Raises:
            Overloaded: The lane's queue is full; nothing was done. `retry_after_s` is when it should have emptied.
            DeadlineExceeded: Time ran out, or the queue makes that certain (without *allow_partial*).
            BackendFailed: The model raised on one of these items.
            OutOfMemory: The device has no room even for one of these items alone.
            NotReady: The worker is dead, or stopping.
        """
        self._check_working()
        size = len(items)
        if self._admitted[lane] + size > self._max_queue_items:
            raise Overloaded(
                f"The {lane} queue is full ({self._max_queue_items:,} items); retry in a moment",
                retry_after_s=self.estimated_wait_s(lane),
            )
        left_s = deadline.remaining_s()
        if not allow_partial:
            self._check_hope(left_s, size, lane, caller)
        if not size or left_s <= 0:
            return Submission([None] * size, 0.0, 0.0, 0.0)
        assert self._loop is not None, "start() comes first"
        job: Job[OutputT] = Job(size, lane, time.monotonic(), self._loop.create_future())
        timer = None
        self._admitted[lane] += size
        self._jobs.add(job)
        try:
            if left_s != float("inf"):
                timer = self._loop.call_later(left_s, _expire, job, allow_partial)
            self._enter(job, items, NO_KEYS if keys is None else keys, caller, deadline.at)
            await job.done
        finally:
            if timer is not None:
                timer.cancel()
            self._leave(job, size)
        return Submission(job.outputs, job.tokenization_s * 1000, job.queue_s * 1000, job.inference_s * 1000)

    def _check_working(self) -> None:
        if self._worker.failure or self._worker.stopping:
            raise NotReady(self._worker.failure or "The service is stopping")

    def _check_hope(self, left_s: float, size: int, lane: Lane, caller: str) -> None:
        """Refuse what cannot be done in time: by the work that goes before it at the least, callers taking turns."""
        if left_s <= 0:
            raise DeadlineExceeded("The time allowed for this request ran out before it began")
        if left_s == float("inf") or not self.cost.ready or self.estimated_wait_s(lane) <= HOPELESS * left_s:
            return
        with self._worker.changed:
            before = self._queues.tokens_before(lane, caller, int(size * self._mean_tokens))
        if self.cost.work_s(size, before, 0, self._max_batch_tokens) > HOPELESS * left_s:
            raise DeadlineExceeded("The queue is longer than the time allowed for this request; nothing was done")

    def _enter(
        self, job: Job[OutputT], items: Sequence[ItemT], keys: Sequence[Hashable], caller: str, deadline_at: float
    ) -> None:
        """Attach *job* to work that is under way, and begin the rest."""
        home = Flow(job.lane, caller)
        fresh: list[Work] = []
        for position, item in enumerate(items):
            key = keys[position] if keys else None
            work = self._in_flight.get(key) if keys else None
            if work is None:
                work = Work(item, key, home, job)
                fresh.append(work)
                if keys:
                    self._in_flight[key] = work
            elif job.lane is Lane.QUERY and work.home.lane is Lane.BULK:
                self._hasten(work, home, fresh)
            work.attach(job, position, deadline_at)
        if job.lane is Lane.QUERY:
            self._worker.last_query_at = job.entered_at
        if len(fresh) < len(items):
            self.observe_coalesced(job.lane, len(items) - len(fresh))
        if fresh:
            self._tokenizers.prepare(fresh, job)

    def _hasten(self, work: Work, home: Flow, fresh: list[Work]) -> None:
        """Have *work*, which is bulk, done as the query it now is as well: wherever it has got to, from there."""
        work.home = home
        if work.unstarted_by is not None:
            work.unstarted_by = home
            fresh.append(work)
            return
        with self._worker.changed:
            queued_at = work.queued_at
            if self._queues.remove(work):
                self._queues.add(home, work)
                work.queued_at = queued_at

    def _enqueue(self, works: list[Work], prepared: Sequence[Any], tokens: Sequence[int], seconds: float) -> None:
        """Have what was prepared wait for the model."""
        worker = self._worker
        with worker.changed:
            if not (worker.failure or worker.stopping):
                for work, one, length in zip(works, prepared, tokens, strict=True):
                    if work.wanted_by:
                        work.item, work.prepared, work.tokens = None, one, length
                        self._queues.add(work.home, work)
                worker.wake()
                stopped = None
            else:
                stopped = NotReady(worker.failure or "The service is stopping")
        if stopped:
            self._fail(works, stopped)
            return
        self._mean_tokens += 0.05 * (sum(tokens) / len(tokens) - self._mean_tokens)
        self.observe_tokenised(works[0].home.lane, seconds)

    def _leave(self, job: Job[OutputT], size: int) -> None:
        """Forget *job*, and what nobody else wants of it."""
        self._jobs.discard(job)
        self._admitted[job.lane] -= size
        if job.remaining:
            if not job.done.cancel() and not job.done.cancelled():
                job.done.exception()  # Seen, even if the caller was cancelled at the same moment.
            with self._worker.changed:
                for work in job.works:
                    self._unwant(work)
        job.works = []

    def _unwant(self, work: Work) -> None:
        work.wanted_by -= 1
        if work.settled or work.wanted_by or work.running:
            return
        self._queues.remove(work)
        self._forget(work)
        work.let_go()

    def _forget(self, work: Work) -> None:
        if self._in_flight.get(work.key) is work:
            del self._in_flight[work.key]

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(callback, *args)

    def _deliver(self, batch: list[Work], outputs: Sequence[OutputT], started: float, seconds: float) -> None:
        for work, output in zip(batch, outputs, strict=True):
            if work.key is not None:
                self.keep(work.key, output)
            self._forget(work)
            for job, position in work.waiters:
                job.take(position, output, batch, work.queued_at, started, seconds)
            work.let_go()

    def _fail(self, works: Sequence[Work], error: BaseException) -> None:
        for work in works:
            self._forget(work)
            for job, _ in work.waiters:
                job.fail(error)
            work.let_go()

    def _fail_all(self) -> None:
        for job in list(self._jobs):
            job.fail(NotReady(self._worker.failure or "The service is stopping"))

    async def _measure(self, items: Sequence[ItemT]) -> tuple[int, float]:
        """Run *items* as one batch of their own; return their longest length in tokens, and the seconds it took."""
        self._check_working()
        assert self._loop is not None, "start() comes first"
        job: Job[OutputT] = Job(len(items), Lane.QUERY, time.monotonic(), self._loop.create_future())
        home = Flow(Lane.QUERY, "")
        self._jobs.add(job)
        try:
            prepared = await self._tokenizers.start(list(items))
            tokens = [self._tokenizers.engine.tokens(one) for one in prepared]
            batch = []
            for position, (one, length) in enumerate(zip(prepared, tokens, strict=True)):
                work = Work(None, None, home, None)
                work.prepared, work.tokens, work.measured, work.running = one, length, True, True
                work.queued_at = time.monotonic()
                work.attach(job, position, float("inf"))
                batch.append(work)
            self._worker.measure(batch)
            await job.done
        finally:
            self._jobs.discard(job)
            job.works = []
        return max(tokens), job.inference_s

    async def aclose(self) -> None:
        """Stop the worker after what is queued; what is not queued yet, and later submissions, are refused with NotReady."""
        self._worker.stop()
        if self._loop is not None and not self._worker.failure:
            await self._loop.run_in_executor(None, self._worker.join)
        self._tokenizers.close()
        self._fail_all()


def _expire(job: Job[Any], allow_partial: bool) -> None:
    """End *job* at its deadline."""
    if not job.done.done():
        if allow_partial:
            job.done.set_result(None)
        else:
            job.fail(DeadlineExceeded("The time allowed for this request ran out before the model got to it"))
