"""The read path where a part of it fails: each step down has its flag, and an answer."""

from dataclasses import replace

import pytest

from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, Overloaded
from tests.search_ports import SEQ, BrokenCache, Stack, ids, make_stack


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


@pytest.mark.parametrize(
    ("error", "flag"),
    [
        (DependencyUnavailable("down"), "embedding_unavailable"),
        (Overloaded("full"), "embedding_unavailable"),
        (DeadlineExceeded("late"), "embedding_late"),
    ],
)
async def test_without_embedding_a_search_is_lexical(stack, error, flag):
    """When the query cannot be embedded BM25 answers, reranked as ever, under exactly one flag."""
    stack.embedding.error = error
    reply = await stack.search()
    assert reply.degraded == [flag]
    assert (reply.pipeline.retrieval, reply.pipeline.rerank) == ("lexical", "ranker")
    assert ids(reply) == ["d", "b", "a"]
    assert stack.retriever.queries[0].vector is None
    assert stack.retriever.queries[0].text == "why"


async def test_without_embedding_a_dense_search_is_lexical_too(stack):
    """Even a search that asked for dense is answered, and says by what."""
    stack.embedding.error = DependencyUnavailable("down")
    reply = await stack.search(mode="dense")
    assert (reply.degraded, reply.pipeline.retrieval) == (["embedding_unavailable"], "lexical")
    assert reply.hits


@pytest.mark.parametrize(
    ("error", "flag"),
    [
        (DependencyUnavailable("down"), "rerank_unavailable"),
        (Overloaded("full"), "rerank_unavailable"),
        (InvalidInput("query is too long"), "rerank_unavailable"),
        (DeadlineExceeded("late"), "rerank_late"),
    ],
)
async def test_without_rerank_the_fused_order_stands(stack, error, flag):
    """When the reranker cannot help the fused order is the answer, under exactly one flag."""
    stack.reranker.error = error
    reply = await stack.search()
    assert (reply.degraded, reply.pipeline.rerank) == ([flag], None)
    assert ids(reply) == ["b", "a", "c", "d"]
    assert {hit.score_kind for hit in reply.hits} == {"fused"}


async def test_a_partial_rerank_keeps_the_rest_in_retrieval_order(stack):
    """What the reranker had no time for follows what it scored, in the order of retrieval."""
    stack.reranker.scores |= {"c": None, "d": None}
    reply = await stack.search()
    assert (reply.degraded, reply.pipeline.rerank) == (["rerank_partial"], "ranker")
    assert ids(reply) == ["b", "a", "c", "d"]
    assert [hit.score_kind for hit in reply.hits] == ["blended", "blended", "fused", "fused"]


async def test_a_rerank_that_scored_nothing_is_late(stack):
    """No score at all is the same as no reranker."""
    stack.reranker.scores = dict.fromkeys("abcd")
    reply = await stack.search()
    assert (reply.degraded, reply.pipeline.rerank) == (["rerank_late"], None)
    assert ids(reply) == ["b", "a", "c", "d"]


async def test_embedding_and_rerank_down_leaves_bm25(stack):
    """With both model services down there still is an answer, and both steps are named."""
    stack.embedding.error = stack.reranker.error = DependencyUnavailable("down")
    reply = await stack.search()
    assert reply.degraded == ["embedding_unavailable", "rerank_unavailable"]
    assert ids(reply) == ["b", "d", "a"]


async def test_missing_shards_are_named(stack):
    """An answer of half the shards says which are missing and why."""
    stack.retriever.answer = replace(stack.retriever.answer, ok=1, failures={1: "broken"})
    reply = await stack.search()
    assert (reply.degraded, reply.coverage.ratio) == (["shards_partial"], 0.5)
    assert [(failure.shard, failure.reason) for failure in reply.coverage.failures] == [(1, "broken")]
    assert (reply.coverage.shards.total, reply.coverage.shards.ok, reply.coverage.shards.failed) == (2, 1, 1)


async def test_shards_that_catch_up_are_named(stack):
    """A shard that is behind the ledger answers for what it has, flagged."""
    stack.retriever.answer = replace(stack.retriever.answer, catching_up=1, as_of=3)
    reply = await stack.search()
    assert (reply.degraded, reply.as_of) == (["catching_up"], 3)


@pytest.mark.parametrize(("timed_out", "error"), [(0, DependencyUnavailable), (2, DeadlineExceeded)])
async def test_without_any_shard_there_is_no_answer(stack, timed_out, error):
    """When every shard fails, or is late, the search fails; it does not answer with nothing."""
    stack.retriever.answer = replace(
        stack.retriever.answer, ok=0, failures={0: "broken", 1: "broken"}, timed_out=timed_out
    )
    with pytest.raises(error):
        await stack.search()


async def test_a_cache_out_of_reach_is_named():
    """Without its cache a search is answered as ever, flagged."""
    reply = await make_stack(cache=BrokenCache()).search()
    assert reply.degraded == ["cache_unavailable"]
    assert ids(reply) == ["d", "c", "b", "a"]


async def test_shards_that_the_fallback_answers_for_are_named(stack):
    """An answer in which the compressed copy stood in for a shard says for how many, and is not kept."""
    stack.retriever.answer = replace(stack.retriever.answer, fallback=1)
    reply = await stack.search()
    assert (reply.degraded, reply.coverage.ratio, reply.coverage.shards.fallback) == (["fallback_index"], 1.0, 1)
    assert not (await stack.search()).cache.hit


# --- the ledger's database


async def test_readers_do_not_ask_the_database(stack):
    """Searches, and waits for operations that this process has heard of, ask no more than what the name means."""
    await stack.search(min_seq=SEQ)
    await stack.search(cache=False)
    assert stack.ledger.asked == 0


async def test_a_database_that_is_down_costs_readers_nothing(stack):
    """While the ledger raises, known collections are searched, and read at known operations, undegraded; none is stale."""
    await stack.search()
    stack.ledger.down = True
    unproven, made, waited = await stack.search(), await stack.search(cache=False), await stack.search(k=2, min_seq=SEQ)
    assert [reply.cache.hit for reply in (unproven, made, waited)] == [False] * 3
    assert [reply.degraded for reply in (unproven, made, waited)] == [[], [], []]
    assert (await stack.search("other")).hits


async def test_an_operation_of_another_writer_is_looked_up(stack):
    """A min_seq that this process has not heard of may be another's: the database knows."""
    stack.ledger.heard = SEQ - 1
    assert (await stack.search(min_seq=SEQ)).degraded == []
    assert stack.ledger.asked == 1


@pytest.mark.parametrize(("applied", "degraded"), [(True, []), (False, ["catching_up"])])
async def test_without_the_database_the_shards_say_how_far_they_are(stack, applied, degraded):
    """An unknown min_seq is waited for all the same; where the shards do not reach it the answer is flagged."""
    stack.ledger.heard = SEQ - 1
    await stack.search()
    stack.ledger.down = True
    stack.retriever.applied = applied
    reply = await stack.search(min_seq=SEQ, cache=False)
    assert (reply.degraded, bool(reply.hits)) == (degraded, True)


async def test_an_older_answer_is_not_given_for_a_newer_operation(stack):
    """An answer kept before the operation that the caller wants to see is no hit, however old a hit may be."""
    stack.ledger.seq = SEQ - 1
    stack.retriever.answer = replace(stack.retriever.answer, as_of=SEQ - 1)
    await stack.search()
    assert (await stack.search()).cache.hit
    stack.ledger.seq = SEQ
    assert (await stack.search(max_stale_s=60)).cache.hit
    assert not (await stack.search(max_stale_s=60, min_seq=SEQ)).cache.hit
