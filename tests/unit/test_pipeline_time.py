"""A search's time and the work done for it: who may use how much, what is left out first, and when nothing is done at all."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from services.common import deadline
from services.common.admission import Admission
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, Overloaded
from services.common.wire.search import SearchRequest
from tests.search_ports import BOOKS, Stack, found, ids, make_stack
from tests.unit.test_pipeline_ladder import FullHouse


class Watching:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.searches: list = []

    def stage(self, stage, seconds) -> None:
        self.stages.append(stage)

    def finished(self, finished) -> None:
        self.searches.append(finished)

    def failed(self, run, error) -> None:
        self.searches.append(error)


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A pipeline where all is well and no time passes, so that what is left of it is known."""
    now = time.monotonic()
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=lambda: now))
    return make_stack(admission=Admission("searches", clock=lambda: now))


async def test_a_search_with_no_time_for_the_model_is_lexical(still):
    """Where time is left for retrieval only, embedding is not asked; the flag says that it was for want of time."""
    stack = still
    reply = await stack.search(timeout_s=0.02, rerank=False)
    assert (reply.degraded, reply.pipeline.retrieval) == (["embedding_late"], "lexical")
    assert stack.embedding.asked == []


async def test_the_split_travels(still):
    """Every stage is given a deadline of its own, before that of the search."""
    stack, given = still, {}

    async def rerank(query, texts, deadline, *, priors):
        given["rerank"] = deadline.remaining_s()
        return await plain(query, texts, deadline, priors=priors)

    plain, stack.reranker.rerank = stack.reranker.rerank, rerank
    await stack.search(timeout_s=0.5)
    # By the priors: 20 ms each for embedding and retrieval, 3 ms for hits, 28 ms for reranking a few.
    assert stack.embedding.asked[0][1].remaining_s() == pytest.approx(0.5 * 20 / 71)
    assert given["rerank"] == pytest.approx(0.49)


async def test_as_many_are_reranked_as_there_is_time_for(still):
    """The best first, as the measured cost affords; the rest follow in fused order, flagged as partial."""
    stack = still
    stack.retriever.candidates = [found(f"{n:02}a", 1 - n / 100) for n in range(40)]
    reply = await stack.search(timeout_s=0.095, query_vector=[1.0, 0.0], rerank_candidates=40, k=40)
    assert [len(asked) for asked in stack.reranker.asked] == [
        17
    ]  # 85 ms are left but for the hits, at 4 a pair and call.
    assert reply.degraded == ["rerank_partial"]
    assert sum(hit.stages.rerank is not None for hit in reply.hits) == 17
    assert ids(reply)[17:] == [f"{n:02}a" for n in range(17, 40)]


async def test_with_no_time_left_nothing_is_reranked(still):
    """What is left is for the hits, and the reranker is not asked."""
    stack = still
    reply = await stack.search(timeout_s=0.009, mode="lexical")
    assert (reply.degraded, ids(reply)) == (["rerank_late"], ["b", "d", "a"])
    assert stack.reranker.asked == []


async def test_pressure_leaves_candidates_out():
    """When there is too much to do fewer are reranked, which the reply says, and the wait is in the explanation."""
    stack = make_stack(admission=FullHouse())
    stack.retriever.candidates = [found(f"{n:02}a", 1 - n / 100) for n in range(20)]
    reply = await stack.search(rerank_candidates=20, explain=True)
    assert (reply.degraded, len(stack.reranker.asked[0])) == (["rerank_reduced"], 5)
    admission = reply.explain.admission
    assert (admission.waited_ms, admission.pressure, admission.in_flight, admission.limit) == (250.0, 1.0, 3.0, 4.0)


async def test_pressure_from_elsewhere_leaves_none_out():
    """Where the reranker has next to nothing to do, searches wait for something else, and fewer candidates would not help."""
    stack = make_stack(admission=FullHouse())
    stack.reranker.under_way = 1
    stack.retriever.candidates = [found(f"{n:02}a", 1 - n / 100) for n in range(20)]
    reply = await stack.search(rerank_candidates=20)
    assert (reply.degraded, len(stack.reranker.asked[0])) == ([], 20)


async def test_pressure_leaves_few_candidates_alone():
    """Where there are no more than are reranked at least, nothing is left out and nothing is said."""
    assert (await make_stack(admission=FullHouse()).search()).degraded == []


async def test_a_search_waits_for_its_turn():
    """Work is let in up to the limit; who has not the time to wait is told so, and a hit of the cache needs no turn."""
    stack = make_stack(admission=Admission("searches", floor=1.0, ceiling=1.0, max_waiting=0))
    kept = await stack.search()
    held = asyncio.Event()

    async def wait(*_asked, **_more):
        await held.wait()

    plain, stack.retriever.retrieve = stack.retriever.retrieve, wait
    first = asyncio.create_task(stack.search("first"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await stack.search("second")
    assert (await stack.search()).hits == kept.hits
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    stack.retriever.retrieve = plain
    assert (await stack.search("third")).hits


async def test_nothing_runs_for_a_caller_that_left(stack):
    """A search that is cancelled in one stage begins no other."""
    begun = asyncio.Event()

    async def hang(*_asked, **_more):
        begun.set()
        await asyncio.Event().wait()

    stack.embedding.embed_query = hang
    search = asyncio.create_task(stack.search())
    await begun.wait()
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    await asyncio.sleep(0.01)
    assert (stack.retriever.queries, stack.reranker.asked) == ([], [])


async def test_a_search_whose_time_is_over_is_not_begun(stack):
    """It fails before any part is asked."""
    with pytest.raises(DeadlineExceeded):
        await stack.search(timeout_s=-1.0)
    assert (stack.embedding.asked, stack.retriever.queries) == ([], [])


async def test_the_watch_is_told_of_a_search_that_fails():
    """So that the slow log has it."""
    watch = Watching()
    stack = make_stack(watch=watch)
    with pytest.raises(DeadlineExceeded) as caught:
        await stack.search(timeout_s=-1.0)
    assert watch.searches == [caught.value]


async def test_vectors_that_are_known_are_not_asked_for_again(stack):
    """A batch has embedded its questions at once; a question that it has not is embedded as ever."""
    vector = np.array([0.6, 0.8], dtype=np.float32)
    for query in ("why", "else"):
        request = SearchRequest(query=query, collection="books")
        await stack.pipeline.answer(request, Deadline.after(30.0), embedded={"why": vector})
    assert [text for text, _ in stack.embedding.asked] == ["else"]
    assert stack.retriever.queries[0].vector == pytest.approx([0.6, 0.8])


# --- documents that are found and cannot be read


async def test_a_shard_that_cannot_be_read_is_named(stack):
    """Where nothing was written since, what is missing was not deleted: its shard is not in the answer."""
    stack.retriever.gone = {"a"}
    reply = await stack.search()
    assert (ids(reply), reply.degraded) == (["d", "c", "b"], ["shards_partial"])
    assert (reply.coverage.shards.ok, reply.coverage.shards.failed, reply.coverage.ratio) == (1, 1, 0.5)
    assert [failure.shard for failure in reply.coverage.failures] == [0]


async def test_a_document_that_may_be_deleted_flags_nothing(stack):
    """Where the collection has moved on since, a document that is missing is taken as deleted."""
    stack.retriever.gone = {"a"}
    stack.ledger.seq += 1
    reply = await stack.search()
    assert (ids(reply), reply.degraded, reply.coverage.ratio) == (["d", "c", "b"], [], 1.0)


# --- who is told


async def test_every_search_that_was_made_is_told_of():
    """With what was asked of the shards, what they found, and both orders; a hit of the cache is not told of."""
    watch = Watching()
    stack = make_stack(watch=watch)
    reply = await stack.search()
    await stack.search()
    [finished] = watch.searches
    assert finished.run.collection == BOOKS
    assert finished.query is stack.retriever.queries[0]
    assert (list(finished.fused), list(finished.last)) == (["b", "a", "c", "d"], ["d", "c", "b", "a"])
    assert [hit.id for hit in finished.reply.hits] == ids(reply)
    assert {"embed", "retrieve", "fuse", "rerank", "hits", "total"} <= set(watch.stages)


async def test_a_search_without_rerank_has_one_order():
    """Then there is nothing to compare."""
    watch = Watching()
    await make_stack(watch=watch).search(rerank=False)
    assert watch.searches[0].last == []


async def test_an_older_answer_is_told_of():
    """It was made of nothing."""
    watch = Watching()
    stack = make_stack(watch=watch)
    await stack.search()
    stack.ledger.seq += 1

    async def fail(*_asked, **_more):
        raise Overloaded("full")

    stack.retriever.retrieve = fail
    await stack.search()
    finished = watch.searches[-1]
    assert (finished.query, finished.retrieved, finished.reply.degraded) == (None, None, ["stale"])


async def test_the_whole_story_is_told_to_who_asks(stack):
    """The budget, what the cache would have said, admission and breakers."""
    await stack.search()
    story = (await stack.search(explain=True, timeout_s=2.0)).explain
    assert 0 < story.budget.timeout_ms <= 2000
    assert set(story.budget.stages_ms) == {"embed", "retrieve", "rerank"}
    assert story.budget.rerank_candidates >= 10
    assert (story.cache.decision, story.admission.pressure) == ("fresh", 0.0)
    assert story.breakers == {"embedding": "closed", "rerank": "open"}
    assert (await stack.search(explain=True, cache=False)).explain.cache.decision == "off"
