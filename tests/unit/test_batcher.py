"""The shared inference worker: order, bounds, deadlines, cancellation, and who hears of which failure."""

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress

import pytest

from services.common.batching import Batcher, BatchObservation, Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import BackendFailed, DeadlineExceeded, InvalidInput, NotReady, Overloaded
from tests.batching_engine import PATIENCE_S, Echo, TokenBatcher, occupy, texts, until


@pytest.fixture
def engine() -> Echo:
    """An engine whose gate is open."""
    return Echo()


@pytest.fixture
async def start(engine: Echo) -> AsyncIterator[Callable[..., Awaitable[TokenBatcher]]]:
    """Start batchers over the engine; they are closed, the gate open, at the end."""
    async with AsyncExitStack() as stack:

        async def start(**options) -> TokenBatcher:
            batcher: TokenBatcher = Batcher(engine, **options)
            await batcher.start()
            stack.push_async_callback(batcher.aclose)
            return batcher

        yield start
        engine.gate.set()


async def test_concurrent_callers_each_get_their_own_in_order(start, engine):
    """Callers that share batches get the outputs of their own items, in the order of the items."""
    batcher = await start(max_batch_tokens=120, max_batch_items=16, sort_window=40)
    asked = [texts(300, f"caller{number}") for number in range(8)]
    lanes = [Lane.QUERY, Lane.BULK] * 4
    answers = await asyncio.gather(
        *(batcher.submit(one, lane=lane, deadline=NO_DEADLINE) for one, lane in zip(asked, lanes, strict=True))
    )
    assert [answer.outputs for answer in answers] == [[text.upper() for text in one] for one in asked]
    assert any(len({text.partition("-")[0] for text in batch}) > 1 for batch in engine.batches)
    assert (batcher.depth(Lane.QUERY), batcher.depth(Lane.BULK)) == (0, 0)


async def test_nothing_asked_is_answered_at_once(start, engine):
    """A submission without items returns without a batch."""
    batcher = await start()
    async with asyncio.timeout(PATIENCE_S):
        assert (await batcher.submit([], lane=Lane.QUERY, deadline=NO_DEADLINE)).outputs == []
    assert engine.batches == []


async def test_a_full_lane_refuses_and_forgets(start, engine):
    """At the bound a submission is refused with nothing done; the other lane, and later calls, are unaffected."""
    batcher = await start(max_queue_items=10)
    busy = await occupy(batcher, engine)
    waiting = asyncio.create_task(batcher.submit(texts(9), lane=Lane.QUERY, deadline=NO_DEADLINE))
    await until(lambda: batcher.depth(Lane.QUERY) == 10)
    with pytest.raises(Overloaded, match="query queue is full"):
        await batcher.submit(["refused"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert batcher.depth(Lane.QUERY) == 10
    bulk = asyncio.create_task(batcher.submit(["other lane"], lane=Lane.BULK, deadline=NO_DEADLINE))
    engine.gate.set()
    await asyncio.gather(busy, waiting, bulk)
    assert "refused" not in engine.seen
    assert batcher.depth(Lane.QUERY) == 0
    assert (await batcher.submit(["later"], lane=Lane.QUERY, deadline=NO_DEADLINE)).outputs == ["LATER"]


async def test_work_after_its_deadline_never_runs(start, engine):
    """A deadline that passes in the queue is DeadlineExceeded, and the model never sees the items."""
    batcher = await start()
    busy = await occupy(batcher, engine)
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(["late"], lane=Lane.QUERY, deadline=Deadline.after(0.02))
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(["passed"], lane=Lane.QUERY, deadline=Deadline.after(-1))
    engine.gate.set()
    await busy
    await batcher.submit(["after"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert engine.seen == ["busy", "after"]
    assert batcher.depth(Lane.QUERY) == 0


async def test_a_partial_answer_has_what_was_ready(start, engine):
    """With allow_partial the deadline leaves None where there is no output yet, and the answer stays as it was given."""
    batcher = await start(max_batch_items=2, sort_window=2)
    runs = iter(range(100))

    def run_two_batches_then_wait(batch: Sequence[str]) -> Sequence[str]:
        if next(runs) >= 2:
            engine.running.set()
            assert engine.gate.wait(PATIENCE_S)
        return [item.upper() for item in batch]

    engine.run = run_two_batches_then_wait
    engine.gate.clear()
    asked = texts(8)
    done = await batcher.submit(asked, lane=Lane.QUERY, deadline=Deadline.after(0.5), allow_partial=True)
    expected = [text.upper() for text in asked[:4]] + [None] * 4
    assert done.outputs == expected
    engine.gate.set()
    await batcher.submit(["next"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert done.outputs == expected
    assert next(runs) == 4


async def test_a_cancelled_caller_leaves_the_queue(start, engine):
    """Cancelling drops what is queued before the model sees it, and frees the caller's place."""
    batcher = await start()
    busy = await occupy(batcher, engine)
    gone = asyncio.create_task(batcher.submit(texts(50, "gone"), lane=Lane.BULK, deadline=NO_DEADLINE))
    stays = asyncio.create_task(batcher.submit(["stays"], lane=Lane.BULK, deadline=NO_DEADLINE))
    await until(lambda: len(engine.queued) == 52)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert batcher.depth(Lane.BULK) == 1
    engine.gate.set()
    await asyncio.gather(busy, stays)
    assert engine.seen == ["busy", "stays"]


async def test_a_cancelled_callers_items_are_let_go_at_once(start, engine):
    """What a cancelled caller had queued is not kept in memory until its turn would have come."""

    class Text(str):
        pass

    batcher = await start()
    busy = await occupy(batcher, engine)
    asked = [Text("gone")]
    reference = weakref.ref(asked[0])
    gone = asyncio.create_task(batcher.submit(asked, lane=Lane.BULK, deadline=NO_DEADLINE))
    await until(lambda: "gone" in engine.queued)
    gone.cancel()
    await asyncio.wait([gone])
    engine.queued.clear()
    del asked, gone
    gc.collect()
    assert reference() is None
    engine.gate.set()
    await busy


async def test_a_failure_reaches_the_guilty_caller_alone(start, engine):
    """In a batch that raises, only the caller of the guilty item fails; the others get their outputs."""
    batcher = await start()
    busy = await occupy(batcher, engine)
    callers = [["fine-1", "fine-2"], ["ok", "bad-1"], ["good"], ["bad-2"], texts(20)]
    waiting = [asyncio.create_task(batcher.submit(one, lane=Lane.QUERY, deadline=NO_DEADLINE)) for one in callers]
    await until(lambda: len(engine.queued) == 1 + sum(map(len, callers)))
    engine.gate.set()
    await busy
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(result, BackendFailed) for result in results] == [False, True, False, True, False]
    assert results[0].outputs == ["FINE-1", "FINE-2"]
    assert results[4].outputs == [text.upper() for text in callers[4]]
    assert "ValueError" in results[1].message
    assert batcher.problems() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_worker_fails_all_waiters_at_once(start, engine):
    """A worker that dies fails everybody who waits, says why in problems(), and later calls are refused."""
    batcher = await start(max_batch_items=1)
    busy = await occupy(batcher, engine)
    doomed = asyncio.create_task(batcher.submit(["die"], lane=Lane.QUERY, deadline=NO_DEADLINE))
    await until(lambda: "die" in engine.queued)
    waiting = asyncio.create_task(batcher.submit(texts(40), lane=Lane.BULK, deadline=NO_DEADLINE))
    await until(lambda: len(engine.queued) == 42)
    engine.gate.set()
    assert (await busy).outputs == ["BUSY"]
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(doomed, waiting, return_exceptions=True)
    assert [type(result) for result in results] == [NotReady, NotReady]
    assert "SystemExit" in batcher.problems()[0]
    with pytest.raises(NotReady, match="died"):
        await batcher.submit(["later"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert (batcher.depth(Lane.QUERY), batcher.depth(Lane.BULK)) == (0, 0)


async def test_a_hanging_worker_fails_its_waiters(start, engine):
    """A batch that runs longer than hang_s fails those in it and those behind it, and problems() says so."""
    batcher = await start(hang_s=0.1)
    busy = await occupy(batcher, engine)
    behind = asyncio.create_task(batcher.submit(["behind"], lane=Lane.BULK, deadline=NO_DEADLINE))
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(busy, behind, return_exceptions=True)
    assert [type(result) for result in results] == [NotReady, NotReady]
    assert "hung" in batcher.problems()[0]


async def test_a_query_passes_a_large_submission(start, engine):
    """A query that arrives in the middle of bulk work goes into the next batch and is finished first."""
    batcher = await start(max_batch_items=8)
    finished = []

    async def submit(name: str, items: list[str], lane: Lane) -> None:
        await batcher.submit(items, lane=lane, deadline=NO_DEADLINE)
        finished.append(name)

    busy = await occupy(batcher, engine)
    bulk = asyncio.create_task(submit("bulk", texts(1000), Lane.BULK))
    await until(lambda: len(engine.queued) == 1001)
    query = asyncio.create_task(submit("query", ["question"], Lane.QUERY))
    await until(lambda: "question" in engine.queued)
    engine.gate.set()
    await asyncio.gather(busy, bulk, query)
    assert finished == ["query", "bulk"]
    assert next(number for number, batch in enumerate(engine.batches) if "question" in batch) <= 2


async def test_a_large_submission_starts_before_it_is_all_tokenised(start, engine):
    """Chunks are queued as they are tokenised, so the model begins while the rest is still being prepared."""
    batcher = await start()
    chunks = []
    prepare = engine.prepare

    def slow_after_the_first(items: Sequence[str]) -> Sequence[str]:
        chunks.append(len(items))
        if len(chunks) > 1:
            assert engine.running.wait(PATIENCE_S)
        return prepare(items)

    engine.prepare = slow_after_the_first
    done = await batcher.submit(texts(300), lane=Lane.BULK, deadline=NO_DEADLINE)
    assert len(chunks) > 1
    assert done.outputs == [text.upper() for text in texts(300)]


async def test_closing_finishes_what_is_queued(start, engine):
    """aclose lets queued work finish, and refuses what comes after with NotReady."""
    batcher = await start()
    busy = await occupy(batcher, engine)
    queued = asyncio.create_task(batcher.submit(texts(30), lane=Lane.BULK, deadline=NO_DEADLINE))
    await until(lambda: len(engine.queued) == 31)
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        await batcher.submit(["during"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    engine.gate.set()
    await closing
    assert (await busy).outputs == ["BUSY"]
    assert (await queued).outputs == [text.upper() for text in texts(30)]
    with pytest.raises(NotReady):
        await batcher.submit(["after"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert not {"during", "after"} & set(engine.seen)


async def test_what_the_tokenizer_refuses_reaches_the_caller(start, engine):
    """An error of prepare is the caller's own, as it was raised, and nothing of the submission runs."""
    batcher = await start()
    with pytest.raises(InvalidInput) as caught:
        await batcher.submit(["refuse"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert caught.value.param == "query"
    assert batcher.depth(Lane.QUERY) == 0
    assert (await batcher.submit(["fine"], lane=Lane.QUERY, deadline=NO_DEADLINE)).outputs == ["FINE"]
    assert engine.seen == ["fine"]


async def test_an_idle_worker_waits_for_nothing(start, engine):
    """A lone item is a batch of one: the worker does not wait for company."""
    batcher = await start()
    for number in range(3):
        await batcher.submit([f"one-{number}"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert engine.batches == [["one-0"], ["one-1"], ["one-2"]]


async def test_each_batch_is_observed_with_its_padding(start, engine):
    """What was computed and what was asked for are both reported, by lane."""
    batcher = await start()
    seen: list[BatchObservation] = []
    batcher.observe = seen.append
    busy = await occupy(batcher, engine)
    both = asyncio.create_task(batcher.submit(["ab", "abcdef"], lane=Lane.BULK, deadline=NO_DEADLINE))
    await until(lambda: len(engine.queued) == 3)
    engine.gate.set()
    await asyncio.gather(busy, both)
    await until(lambda: len(seen) > 1)
    assert sum(batch.tokens for batch in seen if batch.lane is Lane.BULK) == 8
    assert all(batch.padded_tokens >= batch.tokens and batch.seconds >= 0 for batch in seen)


async def test_times_say_where_a_submission_waited(start, engine):
    """A submission reports the time in the queue apart from the time in the model."""
    batcher = await start()
    busy = await occupy(batcher, engine)
    waiting = asyncio.create_task(batcher.submit(["behind"], lane=Lane.QUERY, deadline=NO_DEADLINE))
    await until(lambda: "behind" in engine.queued)
    await asyncio.sleep(0.03)
    engine.gate.set()
    first, second = await asyncio.gather(busy, waiting)
    assert first.inference_ms >= 25
    assert second.queue_ms >= 25
    assert second.inference_ms < first.inference_ms


async def test_many_callers_leaving_at_random_leave_no_trace(start, engine):
    """After a crowd of callers of which some cancel and some run late, counts are zero and the worker is well."""
    batcher = await start(max_batch_tokens=64, max_batch_items=4)
    run = engine.run

    def run_slowly(batch: Sequence[str]) -> Sequence[str]:
        time.sleep(0.0005)
        return run(batch)

    engine.run = run_slowly

    async def caller(number: int) -> bool:
        deadline = Deadline.after(0.01) if number % 3 == 1 else NO_DEADLINE
        asked = texts(5, f"c{number}")
        task = asyncio.create_task(batcher.submit(asked, lane=list(Lane)[number % 2], deadline=deadline))
        if number % 3 == 2:
            await asyncio.sleep(number % 7 / 1000)
            task.cancel()
        with suppress(asyncio.CancelledError, DeadlineExceeded):
            return (await task).outputs == [text.upper() for text in asked]
        return number % 3 != 0

    assert all(await asyncio.gather(*(caller(number) for number in range(120))))
    assert (batcher.depth(Lane.QUERY), batcher.depth(Lane.BULK)) == (0, 0)
    assert batcher.problems() == []
    assert (await batcher.submit(["end"], lane=Lane.QUERY, deadline=NO_DEADLINE)).outputs == ["END"]
