"""Which answers are kept, when they are given again, and what makes two questions the same."""

import asyncio
import time
from dataclasses import replace

import pytest

from services.common.deadline import Deadline
from services.common.errors import DependencyUnavailable, Unavailable
from services.common.wire.search import SearchRequest
from services.search.cache import MemoryResultCache
from tests.search_ports import BOOKS, SEQ, Stack, make_stack


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


async def test_the_same_search_again_is_a_hit(stack):
    """A second search is answered from the cache with the same hits, its own request id, and its age."""
    first = await stack.search()
    second = await stack.search()
    assert second.cache.hit
    assert second.cache.age_ms >= 0
    assert second.hits == first.hits
    assert (second.as_of, second.pipeline, second.request_id) == (first.as_of, first.pipeline, "r-1")
    assert len(stack.retriever.queries) == 1


async def test_a_write_ends_a_hit(stack):
    """Once the collection has moved the answer is made anew, and kept again when the shards have followed."""
    await stack.search()
    stack.ledger.seq += 1
    assert not (await stack.search()).cache.hit
    assert not (await stack.search()).cache.hit
    stack.retriever.answer = replace(stack.retriever.answer, as_of=SEQ + 1)
    assert not (await stack.search()).cache.hit
    assert (await stack.search()).cache.hit


@pytest.mark.parametrize(
    "other",
    [
        {"query": "why not"},
        {"k": 3},
        {"offset": 1},
        {"mode": "dense"},
        {"fusion": "rrf"},
        {"filter": {"n": 1}},
        {"rerank": False},
        {"candidates": 5},
        {"rerank_candidates": 5},
        {"include": ["text"]},
        {"include": ["text", "metadata", "highlights"]},
        {"highlights_max_chars": 50},
        {"lexical": {"match": "all"}},
        {"lexical": {"prefix": True}},
        {"lexical": {"stop_words": False}},
        {"exact": True},
        {"min_score": {"kind": "dense", "value": 0.2}},
        {"group_by": "n"},
        {"diversity": 0.5},
        {"facets": {"n": 3}},
        {"collection": "own", "query_vector": [1.0, 0.0]},
    ],
    ids=str,
)
async def test_another_question_is_a_miss(stack, other):
    """All that decides the answer is part of the key."""
    await stack.search()
    assert not (await stack.search(**other)).cache.hit


async def test_a_collection_made_anew_has_no_old_answers(stack):
    """A deleted collection's answers are not those of the next one of its name, even at the same operation number."""
    await stack.search()
    stack.ledger.collections["films"] = replace(BOOKS, name="films", uuid="uuid-films")
    assert not (await stack.search(collection="films")).cache.hit
    assert (await stack.search()).cache.hit


async def test_other_time_limits_are_the_same_question(stack):
    """How long the caller waits does not decide the answer."""
    await stack.search()
    assert (await stack.search(timeout_ms=5000, min_seq=1)).cache.hit


async def test_other_settings_are_other_questions():
    """After a restart with other weights a shared cache's old answers are not used."""
    cache = MemoryResultCache(max_bytes=1 << 20, ttl_s=60)
    await make_stack(cache=cache).search()
    assert not (await make_stack(cache=cache, dense_weight=0.9).search()).cache.hit
    assert (await make_stack(cache=cache).search()).cache.hit


async def test_the_cache_can_be_passed_by(stack):
    """cache: false neither reads nor writes it."""
    await stack.search(cache=False)
    assert not (await stack.search()).cache.hit
    assert not (await stack.search(cache=False)).cache.hit


@pytest.mark.parametrize("part", ["embedding", "reranker"])
async def test_degraded_answers_are_not_kept(stack, part):
    """When the part comes back the next answer is whole."""
    getattr(stack, part).error = DependencyUnavailable("down")
    assert (await stack.search()).degraded
    getattr(stack, part).error = None
    reply = await stack.search()
    assert (reply.degraded, reply.cache.hit) == ([], False)


async def test_a_cached_answer_needs_no_model(stack):
    """While the models are down, what is in the cache is answered whole."""
    await stack.search()
    stack.embedding.error = stack.reranker.error = DependencyUnavailable("down")
    reply = await stack.search()
    assert (reply.cache.hit, reply.degraded) == (True, [])


async def test_an_explained_search_passes_the_cache_by(stack):
    """Who asks how it was searched wants it searched."""
    await stack.search()
    assert not (await stack.search(explain=True)).cache.hit
    assert not (await stack.search(explain=True)).cache.hit


async def test_a_restored_ledger_ends_all_hits(stack):
    """Operation numbers of another history mean other contents, so its answers are not given."""
    await stack.search()
    stack.ledger.epoch = "restored"
    assert not (await stack.search()).cache.hit


async def test_answers_outlive_a_restart(stack):
    """An answer of an earlier stretch of the same history is as good as one of this."""
    await stack.search()
    stack.ledger.past, stack.ledger.epoch = {stack.ledger.epoch}, "second"
    assert (await stack.search()).cache.hit


async def test_an_explained_search_says_what_the_cache_would_have_said(stack):
    """Nothing there, then a fresh answer, then one that the collection has moved away from."""
    decisions = [(await stack.search(explain=True)).explain.cache]
    await stack.search()
    decisions.append((await stack.search(explain=True)).explain.cache)
    stack.ledger.seq += 1
    decisions.append((await stack.search(explain=True)).explain.cache)
    told = [(one.decision, one.as_of, one.watermark) for one in decisions]
    assert told == [("absent", None, None), ("fresh", SEQ, SEQ), ("moved", SEQ, SEQ + 1)]


async def test_an_older_answer_where_the_caller_allows_it(stack):
    """Within max_stale_s the collection may have moved; an answer over that age is made anew."""
    await stack.search()
    stack.ledger.seq += 1
    assert (await stack.search(max_stale_s=60)).cache.hit
    assert not (await stack.search(max_stale_s=0.0)).cache.hit
    await asyncio.sleep(0.02)
    assert not (await stack.search(max_stale_s=0.001)).cache.hit


async def test_reading_ones_own_write_beats_staleness(stack):
    """An answer from before min_seq is no hit, however old an answer may be."""
    await stack.search()
    stack.ledger.seq += 1
    assert not (await stack.search(max_stale_s=60, min_seq=SEQ + 1)).cache.hit


async def test_tenants_have_their_own_answers(stack):
    """What one key's search found is not given to another's."""
    await stack.search()
    request = SearchRequest(query="why", collection="books")
    other = await stack.pipeline.search(request, Deadline.after(30), tenant="other")
    assert (other.cache.hit, (await stack.search()).cache.hit) == (False, True)


async def test_the_last_good_answer_when_nothing_can_be_searched(stack):
    """It is flagged stale, with its age; once shards answer again so does the pipeline."""
    first = await stack.search()
    stack.ledger.seq += 1
    stack.retriever.answer = replace(stack.retriever.answer, ok=0, failures={0: "down", 1: "down"})
    reply = await stack.search()
    assert (reply.degraded, reply.cache.hit, reply.cache.stale, reply.hits) == (["stale"], True, True, first.hits)
    assert reply.request_id == "r-1"
    with pytest.raises(Unavailable):
        await stack.search(require={"fresh": True})
    with pytest.raises(Unavailable):
        await stack.search("another question")
    stack.retriever.answer = replace(stack.retriever.answer, ok=2, failures={}, as_of=SEQ + 1)
    reply = await stack.search()
    assert (reply.degraded, reply.cache.hit) == ([], False)


async def test_a_ledger_that_cannot_be_asked_proves_nothing(stack):
    """Whether the collection has moved is not known then: the search runs, as it needs no ledger."""
    await stack.search()
    stack.ledger.down = True
    reply = await stack.search()
    assert (reply.cache.hit, reply.degraded) == (False, [])


async def test_a_clock_that_was_ahead_gives_no_stale_answers(stack, monkeypatch):
    """An answer from the future has no age: it is given where it is proven true, and never as an older one."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    await stack.search()
    monkeypatch.setattr(time, "time", now)
    reply = await stack.search()
    assert (reply.cache.hit, reply.cache.age_ms) == (True, 0)
    stack.ledger.seq += 1
    assert not (await stack.search(max_stale_s=600)).cache.hit


async def test_the_same_question_at_the_same_time_runs_once(stack):
    """A herd of equal searches costs one: embedding, shards and reranker are asked once."""
    replies = await asyncio.gather(*(stack.search() for _ in range(20)))
    assert (len(stack.retriever.queries), len(stack.embedding.asked), len(stack.reranker.asked)) == (1, 1, 1)
    assert all(reply.hits == replies[0].hits for reply in replies)


async def test_who_asks_after_a_write_never_shares_what_began_before_it(stack):
    """A search under way may lack a write that was acknowledged meanwhile; who asks after that gets another one's answer."""
    gate, retrieve = asyncio.Event(), stack.retriever.retrieve

    async def slow(*arguments):
        found = await retrieve(*arguments)
        await gate.wait()
        return found

    stack.retriever.retrieve = slow
    before = asyncio.create_task(stack.search())
    while not stack.retriever.queries:
        await asyncio.sleep(0)
    stack.ledger.seq += 1
    stack.retriever.answer = replace(stack.retriever.answer, as_of=SEQ + 1)
    after = [asyncio.create_task(stack.search()) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    assert (await before).as_of == SEQ
    assert [(await task).as_of for task in after] == [SEQ + 1] * 3
    assert len(stack.retriever.queries) == 2


async def test_other_requirements_are_other_flights(stack):
    """A search that forbids a step down does not fail the others with it."""
    stack.embedding.error = DependencyUnavailable("down")
    strict, plain = await asyncio.gather(stack.search(require={"dense": True}), stack.search(), return_exceptions=True)
    assert isinstance(strict, DependencyUnavailable)
    assert plain.degraded == ["embedding_unavailable"]
