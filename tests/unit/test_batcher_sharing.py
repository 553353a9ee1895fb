"""Identical items in flight are computed once: who gets the output, and who can spoil it for others."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import BackendFailed, DeadlineExceeded, InvalidInput
from tests.batching_engine import PATIENCE_S, Echo, TokenBatcher, occupy, running, texts, until


def ask(
    batcher: TokenBatcher, items: list[str], *, lane: Lane = Lane.QUERY, deadline: Deadline = NO_DEADLINE, **more
) -> "asyncio.Task[object]":
    """Submit *items*, each its own key."""
    return asyncio.create_task(batcher.submit(items, lane=lane, deadline=deadline, keys=items, **more))


async def test_the_same_item_is_computed_once_within_and_across_submissions():
    """Equal keys share one piece of work, tokenised once; every position of every caller gets the output."""
    engine = Echo()
    async with running(engine) as batcher:
        shared = []
        batcher.observe_coalesced = lambda lane, items: shared.append((lane, items))
        busy = await occupy(batcher, engine)
        first = ask(batcher, ["a", "b", "a"])
        second = ask(batcher, ["b", "c"], lane=Lane.BULK)
        await until(lambda: len(engine.queued) == 4)
        engine.gate.set()
        await busy
        assert (await first).outputs == ["A", "B", "A"]
        assert (await second).outputs == ["B", "C"]
    assert sorted(engine.seen) == ["a", "b", "busy", "c"]
    assert sorted(engine.queued) == ["a", "b", "busy", "c"]
    assert shared == [(Lane.QUERY, 1), (Lane.BULK, 1)]


async def test_an_item_that_is_running_is_joined():
    """Who asks while the model works on the same item gets that output; who asks later has it computed again."""
    engine = Echo()
    async with running(engine) as batcher:
        engine.gate.clear()
        first = ask(batcher, ["same"])
        await asyncio.to_thread(engine.running.wait, PATIENCE_S)
        second = ask(batcher, ["same"])
        await asyncio.sleep(0)
        engine.gate.set()
        assert [(await task).outputs for task in (first, second)] == [["SAME"]] * 2
        assert engine.seen == ["same"]
        assert (await ask(batcher, ["same"])).outputs == ["SAME"]
    assert engine.seen == ["same", "same"]


async def test_without_keys_nothing_is_shared():
    """Items without keys are computed each for itself."""
    engine = Echo()
    async with running(engine) as batcher:
        await batcher.submit(["a", "a"], lane=Lane.QUERY, deadline=NO_DEADLINE)
    assert engine.seen == ["a", "a"]


@pytest.mark.parametrize("how", ["cancelled", "expired"])
@pytest.mark.parametrize("who", ["first", "second"])
async def test_a_waiter_that_leaves_does_not_hurt_the_other(how, who):
    """Whichever of two waiters is cancelled or runs out of time, the other gets the output, computed once."""
    engine = Echo()
    async with running(engine) as batcher:
        busy = await occupy(batcher, engine)
        late = Deadline.after(0.02) if how == "expired" else NO_DEADLINE
        first = ask(batcher, ["same"], deadline=late if who == "first" else NO_DEADLINE)
        await until(lambda: "same" in engine.queued)
        second = ask(batcher, ["same"], deadline=late if who == "second" else NO_DEADLINE)
        await asyncio.sleep(0)
        leaves, stays = (first, second) if who == "first" else (second, first)
        if how == "cancelled":
            leaves.cancel()
        with pytest.raises(DeadlineExceeded if how == "expired" else asyncio.CancelledError):
            await leaves
        engine.gate.set()
        await busy
        assert (await stays).outputs == ["SAME"]
    assert engine.seen == ["busy", "same"]


async def test_work_that_nobody_wants_any_more_leaves_the_queue():
    """Work goes when the last of its waiters does, and a later caller has it computed."""
    engine = Echo()
    async with running(engine) as batcher:
        busy = await occupy(batcher, engine)
        gone = [ask(batcher, ["same"]) for _ in range(2)]
        await until(lambda: "same" in engine.queued)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        engine.gate.set()
        await busy
        await ask(batcher, ["other"])
        assert engine.seen == ["busy", "other"]
        assert (await ask(batcher, ["same"])).outputs == ["SAME"]


async def test_a_caller_that_leaves_while_its_items_are_tokenised_takes_nobody_along():
    """Tokenisation that others wait for goes on when the caller that began it is cancelled."""
    engine = Echo()
    tokenizer = threading.Event()
    prepare = engine.prepare

    def prepare_slowly(items: Sequence[str]) -> Sequence[str]:
        assert tokenizer.wait(PATIENCE_S)
        return prepare(items)

    engine.prepare = prepare_slowly
    async with running(engine) as batcher:
        begins = ask(batcher, texts(300))
        await asyncio.sleep(0)
        joins = ask(batcher, texts(300)[290:])
        await asyncio.sleep(0)
        begins.cancel()
        await asyncio.wait([begins])
        tokenizer.set()
        assert (await joins).outputs == [text.upper() for text in texts(300)[290:]]
    assert sorted(engine.seen) == sorted(texts(300)[290:])


async def test_bulk_work_that_a_query_wants_too_goes_with_the_queries():
    """A query for something in the middle of a large bulk submission does not wait for what is before it there."""
    engine = Echo()
    async with running(engine, max_batch_items=8) as batcher:
        busy = await occupy(batcher, engine)
        bulk = ask(batcher, texts(1000), lane=Lane.BULK)
        await until(lambda: len(engine.queued) == 1001)
        query = ask(batcher, [texts(1000)[700]])
        await asyncio.sleep(0)
        engine.gate.set()
        await busy
        assert (await query).outputs == [texts(1000)[700].upper()]
        assert (await bulk).outputs == [text.upper() for text in texts(1000)]
    assert texts(1000)[700] in engine.batches[1] + engine.batches[2]
    assert len(engine.seen) == 1001


async def test_a_query_does_not_wait_for_bulk_work_before_it_to_be_tokenised():
    """Bulk work that a query wants is tokenised with the query if its own turn has not come."""
    engine = Echo()
    second_chunk = threading.Event()
    prepare = engine.prepare

    def prepare_all_but_the_second_chunk(items: Sequence[str]) -> Sequence[str]:
        if texts(1000)[130] in items:
            assert second_chunk.wait(PATIENCE_S)
        return prepare(items)

    engine.prepare = prepare_all_but_the_second_chunk
    async with running(engine, tokenizer_threads=2) as batcher:
        bulk = ask(batcher, texts(1000), lane=Lane.BULK)
        await until(lambda: len(engine.queued) == 128)
        async with asyncio.timeout(PATIENCE_S):
            assert (await ask(batcher, [texts(1000)[700]])).outputs == [texts(1000)[700].upper()]
        second_chunk.set()
        assert (await bulk).outputs == [text.upper() for text in texts(1000)]
    assert len(engine.seen) == 1000


async def test_a_failure_reaches_all_who_wait_for_the_item():
    """The guilty item's error goes to each of its waiters, and to nobody else."""
    engine = Echo()
    async with running(engine) as batcher:
        busy = await occupy(batcher, engine)
        waiting = [ask(batcher, items) for items in (["bad", "x"], ["bad"], ["x", "y"])]
        await until(lambda: len(engine.queued) == 4)
        engine.gate.set()
        await busy
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results[:2]] == [BackendFailed] * 2
    assert results[2].outputs == ["X", "Y"]


async def test_what_the_tokenizer_refuses_fails_nobody_who_shares_another_item():
    """An item that cannot be prepared fails those who want it, not those who share others of the same chunk."""
    engine = Echo()
    tokenizer = threading.Event()
    prepare = engine.prepare

    def prepare_slowly(items: Sequence[str]) -> Sequence[str]:
        assert tokenizer.wait(PATIENCE_S)
        return prepare(items)

    engine.prepare = prepare_slowly
    async with running(engine) as batcher:
        guilty = ask(batcher, ["refuse", "fine"])
        await asyncio.sleep(0)
        innocent = ask(batcher, ["fine"])
        await asyncio.sleep(0)
        tokenizer.set()
        with pytest.raises(InvalidInput):
            await guilty
        assert (await innocent).outputs == ["FINE"]


@settings(max_examples=25, deadline=None)
@given(
    callers=st.lists(
        st.tuples(
            st.sampled_from(Lane),
            st.lists(st.integers(0, 12), max_size=8),
            st.sampled_from(["stays", "stays", "cancelled", "expires"]),
            st.integers(0, 3),
        ),
        max_size=12,
    )
)
def test_whoever_leaves_those_who_stay_get_their_outputs(callers):
    """Under any overlap of submissions and departures, each caller that stays gets all outputs, and nothing is left behind."""

    async def act() -> None:
        engine = Echo()
        async with running(engine, max_batch_items=3, max_batch_tokens=30) as batcher:
            busy = await occupy(batcher, engine)
            staying = []
            for number, (lane, items, fate, pauses) in enumerate(callers):
                words = [f"word {item}" for item in items]
                deadline = Deadline.after(0.002) if fate == "expires" else NO_DEADLINE
                task = ask(batcher, words, lane=lane, deadline=deadline, caller=f"caller {number % 3}")
                for _ in range(pauses):
                    await asyncio.sleep(0)
                if fate == "cancelled":
                    task.cancel()
                elif fate == "stays":
                    staying.append((task, words))
            engine.gate.set()
            await busy
            for task, words in staying:
                assert (await asyncio.wait_for(task, PATIENCE_S)).outputs == [word.upper() for word in words]
            await until(lambda: batcher.depth(Lane.QUERY) + batcher.depth(Lane.BULK) == 0)
            assert batcher.problems() == []
            # Nothing that was under way is kept: all of it is computed again, once.
            await batcher.submit(["last"], lane=Lane.BULK, deadline=NO_DEADLINE)
            engine.batches.clear()
            words = [f"word {item}" for item in range(13)]
            assert (await ask(batcher, words)).outputs == [word.upper() for word in words]
            assert sorted(engine.seen) == sorted(words)

    asyncio.run(act())
