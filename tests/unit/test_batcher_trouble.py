"""The shared inference worker when things go wrong, or might: memory, hangs, hopeless deadlines, large texts, closing."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.common.batching import Batcher, DeviceTurn, Lane
from services.common.batching.metrics import BatchMetrics
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import BackendFailed, DeadlineExceeded, NotReady, OutOfMemory, Overloaded
from services.common.metrics import Metrics
from tests.batching_engine import PATIENCE_S, Echo, occupy, running, texts, until


class SmallDevice(Echo):
    """A device that has room for *room* padded tokens."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room = room
        self.error = error

    def run(self, batch: Sequence[str]) -> Sequence[str]:
        outputs = super().run(batch)
        if len(batch) * max(map(len, batch)) > self.room:
            raise self.error
        return outputs


@pytest.mark.parametrize("error", [OutOfMemory("no room"), MemoryError()], ids=["ours", "Python's"])
async def test_out_of_memory_is_tried_again_smaller(error):
    """A batch that the device has no room for is halved, and those after it are smaller from the start."""
    engine = SmallDevice(40, error)
    async with running(engine, max_batch_tokens=1000) as batcher:
        asked = [f"text {number:03}" for number in range(64)]
        for _ in range(2):
            engine.batches.clear()
            done = await batcher.submit(asked, lane=Lane.BULK, deadline=NO_DEADLINE)
            assert done.outputs == [text.upper() for text in asked]
        assert max(map(len, engine.batches)) <= 8
        with pytest.raises(OutOfMemory):
            await batcher.submit(["x" * 41], lane=Lane.QUERY, deadline=NO_DEADLINE)
        assert batcher.problems() == []


async def test_too_few_outputs_are_a_failure():
    """A model that loses an output fails the callers; nobody waits for ever."""
    engine = Echo()
    engine.run = lambda batch: []
    async with running(engine) as batcher:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(BackendFailed, match="0 outputs for 1"):
                await batcher.submit(["a", "b"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        assert batcher.problems() == []


async def test_a_tokenizer_that_loses_an_item_is_a_failure():
    """Results that do not match the items fail the caller."""
    engine = Echo()
    engine.prepare = lambda items: items[1:]
    async with running(engine) as batcher:
        with pytest.raises(BackendFailed, match="1 results for 2 items"):
            await batcher.submit(["a", "b"], lane=Lane.QUERY, deadline=NO_DEADLINE)


async def test_an_observer_that_raises_does_no_harm():
    """What listens to batches cannot stop the worker."""
    engine = Echo()
    async with running(engine) as batcher:

        def refuse(_batch: object) -> None:
            raise ValueError

        batcher.observe = refuse
        for _ in range(2):
            assert (await batcher.submit(["a"], lane=Lane.QUERY, deadline=NO_DEADLINE)).outputs == ["A"]
        assert batcher.problems() == []


async def test_a_full_queue_says_when_to_come_again_before_any_tokenisation():
    """Overloaded carries the estimated wait, and nothing was tokenised for who is refused."""
    engine = Echo()
    async with running(engine, max_queue_items=20) as batcher:
        busy = await occupy(batcher, engine)
        waiting = asyncio.create_task(batcher.submit(texts(19), lane=Lane.QUERY, deadline=NO_DEADLINE))
        await until(lambda: len(engine.queued) == 20)
        with pytest.raises(Overloaded) as refused:
            await batcher.submit(["refused"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        assert refused.value.retry_after_s == pytest.approx(batcher.estimated_wait_s(Lane.QUERY), rel=0.5)
        assert refused.value.retry_after_s > 0
        assert "refused" not in engine.queued
        engine.gate.set()
        await asyncio.gather(busy, waiting)


async def test_what_cannot_be_done_in_time_is_refused_at_once():
    """Work whose deadline the queue makes hopeless is refused untouched, unless part of it would do, or it goes first."""
    engine = Echo()
    async with running(engine) as batcher:
        batcher.cost.calibrate([(1, 10, 1.0), (10, 10, 10.0)])  # A tenth of a second a token.
        busy = await occupy(batcher, engine)
        bulk = asyncio.create_task(batcher.submit(["x" * 99] * 9, lane=Lane.BULK, deadline=NO_DEADLINE, caller="a"))
        await until(lambda: len(engine.queued) == 10)
        ten_s = Deadline.after(10)
        with pytest.raises(DeadlineExceeded, match="longer than the time"):
            await batcher.submit(["y"] * 100, lane=Lane.BULK, deadline=ten_s, caller="a")
        waiting = [
            asyncio.create_task(batcher.submit(["partial"] * 100, lane=Lane.BULK, deadline=ten_s, allow_partial=True)),
            asyncio.create_task(batcher.submit(["another"], lane=Lane.BULK, deadline=ten_s, caller="b")),
            asyncio.create_task(batcher.submit(["query"], lane=Lane.QUERY, deadline=ten_s, caller="a")),
        ]
        await until(lambda: len(engine.queued) == 112)
        engine.gate.set()
        await asyncio.gather(busy, bulk, *waiting)
    assert "y" not in engine.queued


async def test_a_deadline_that_passed_starts_nothing():
    """With no time left nothing is tokenised: an error, or with allow_partial an answer without outputs."""
    engine = Echo()
    async with running(engine) as batcher:
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(["a"], lane=Lane.QUERY, deadline=Deadline.after(-1))
        done = await batcher.submit(["a", "b"], lane=Lane.QUERY, deadline=Deadline.after(-1), allow_partial=True)
        assert done.outputs == [None, None]
    assert engine.queued == []


class Sized(Echo):
    """An engine that tells sizes; tokenising a text of a million characters waits for *large*."""

    def __init__(self) -> None:
        super().__init__()
        self.large = threading.Event()
        self.chunks: list[list[int]] = []
        self.threads: set[str] = set()

    def size(self, item: str) -> int:
        return len(item)

    def quick(self, items: Sequence[str]) -> bool:
        return len(items) == 1 and len(items[0]) < 20

    def prepare(self, items: Sequence[str]) -> Sequence[str]:
        self.chunks.append([len(item) for item in items])
        self.threads.add(threading.current_thread().name)
        if any(len(item) == 1_000_000 for item in items):
            assert self.large.wait(PATIENCE_S)
        return [item[:50] for item in items]


async def test_a_huge_text_is_tokenised_alone_and_stalls_nobody():
    """While a text of a million characters is tokenised, others are, in the same submission and in others."""
    engine = Sized()
    async with running(engine, tokenizer_threads=1) as batcher:
        huge = asyncio.create_task(
            batcher.submit(["before", "x" * 1_000_000, "after"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        )
        await until(lambda: [1_000_000] in engine.chunks)
        async with asyncio.timeout(PATIENCE_S):
            done = await batcher.submit(texts(200), lane=Lane.QUERY, deadline=NO_DEADLINE)
        assert done.outputs == [text[:50].upper() for text in texts(200)]
        assert not huge.done()
        engine.large.set()
        assert (await huge).outputs == ["BEFORE", "X" * 50, "AFTER"]


async def test_chunks_are_bounded_in_characters():
    """A chunk takes only so many characters, so long texts leave room for others between them."""
    engine = Sized()
    async with running(engine) as batcher:
        await batcher.submit(["x" * 30_000] * 10, lane=Lane.BULK, deadline=NO_DEADLINE)
    assert engine.chunks == [[30_000] * 2] * 5


async def test_what_is_quick_is_prepared_in_the_event_loop():
    """What the engine calls quick goes to no thread, and its error is the caller's as ever."""
    engine = Sized()
    async with running(engine) as batcher:
        assert (await batcher.submit(["short"], lane=Lane.QUERY, deadline=NO_DEADLINE)).outputs == ["SHORT"]
        assert engine.threads == {threading.main_thread().name}
        engine.prepare = lambda _items: 1 / 0
        with pytest.raises(ZeroDivisionError):
            await batcher.submit(["short"], lane=Lane.QUERY, deadline=NO_DEADLINE)
        assert batcher.depth(Lane.QUERY) == 0


async def test_closing_while_a_chunk_waits_for_the_tokenizer_is_not_ready():
    """Callers whose items wait for a tokenizer thread, or are in one, when the batcher closes get NotReady."""
    engine = Sized()
    async with running(engine, tokenizer_threads=1) as batcher:
        tasks = [
            asyncio.create_task(
                batcher.submit(["x" * 1_000_000, *texts(3, name)], lane=Lane.BULK, deadline=NO_DEADLINE)
            )
            for name in "abc"
        ]
        await until(lambda: engine.chunks)
        await batcher.aclose()
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        engine.large.set()
    assert [type(result) for result in results] == [NotReady] * 3


async def test_models_on_one_device_take_turns_and_waiting_is_no_hang():
    """While one model has the device another waits, for longer than hang_s if need be, and then runs."""
    turn, first, second = DeviceTurn(), Echo(), Echo()
    async with running(first, turn=turn) as one, running(second, turn=turn, hang_s=0.05) as other:
        busy = await occupy(one, first)
        waiting = asyncio.create_task(other.submit(["waits"], lane=Lane.QUERY, deadline=NO_DEADLINE))
        await until(lambda: second.queued)
        await asyncio.sleep(0.2)
        assert second.seen == []
        assert other.problems() == []
        first.gate.set()
        assert (await waiting).outputs == ["WAITS"]
        await busy


async def test_a_model_that_hangs_takes_its_device_along():
    """When a batch hangs, those who wait for the device with other models fail too, at once, and all say so."""
    turn, first, second = DeviceTurn(), Echo(), Echo()
    async with running(first, turn=turn, hang_s=0.1) as one, running(second, turn=turn) as other:
        busy = await occupy(one, first)
        waiting = asyncio.create_task(other.submit(["waits"], lane=Lane.QUERY, deadline=NO_DEADLINE))
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(busy, waiting, return_exceptions=True)
        assert [type(result) for result in results] == [NotReady] * 2
        assert "hung" in one.problems()[0]
        assert "hung" in other.problems()[0]


async def test_calibration_measures_within_the_bounds_of_a_batch():
    """Calibrating runs batches of several sizes through the worker, none over a bound, and makes predictions ready."""
    engine = Echo()
    async with running(engine, max_batch_tokens=300, max_batch_items=16) as batcher:
        assert not batcher.cost.ready
        await batcher.calibrate(lambda tokens: "x" * tokens)
        assert batcher.cost.ready
        assert all(len(batch) <= 16 for batch in engine.batches)
        assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= 300 for batch in engine.batches)
        assert len({(len(batch), len(batch[0])) for batch in engine.batches}) > 4


async def test_calibration_of_a_model_that_fails_says_so():
    """What the model raises at warm-up is the caller's to see, and the batcher lives on."""
    engine = Echo()
    async with running(engine) as batcher:
        with pytest.raises(BackendFailed):
            await batcher.calibrate(lambda tokens: "bad".ljust(tokens, "x"))
        assert not batcher.cost.ready
        assert batcher.problems() == []


async def test_metrics_count_every_batcher_that_is_watched():
    """One set of metrics serves several batchers: queue waits, tokenisation, shared items, depth and padding add up."""
    metrics = Metrics("test")
    watch = BatchMetrics(metrics, "work")
    async with running(Echo()) as one, running(Echo()) as other:
        for batcher in (one, other):
            watch.watch(batcher)
            await submit_twice_the_same(batcher)
    samples = {
        (sample.name, sample.labels.get("lane", "")): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }
    assert samples["tercet_work_coalesced_items_total", "query"] == 2
    assert samples["tercet_work_tokens_total", "query"] == 8
    assert samples["tercet_work_queue_seconds_count", "query"] == 4
    assert samples["tercet_work_tokenization_seconds_count", "query"] == 2
    assert samples["tercet_work_batch_items_sum", ""] == 4
    assert samples["tercet_work_padding_tokens_total", ""] >= 0
    assert samples["tercet_work_query_queue_items", ""] == 0


async def submit_twice_the_same(batcher: Batcher[str, str]) -> None:
    """Submit three items, of which two are the same."""
    items = ["a", "a", "bcd"]
    await batcher.submit(items, lane=Lane.QUERY, deadline=NO_DEADLINE, keys=items)
