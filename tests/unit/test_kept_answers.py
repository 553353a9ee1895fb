"""Which answers are kept, when they are given again, and what makes two questions the same."""

from dataclasses import replace

import pytest

from services.common.errors import DependencyUnavailable
from services.search.cache import MemoryResultCache
from services.search.ports import CacheEntry
from tests.search_ports import BOOKS, SEQ, Stack, ids, make_stack


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


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"collection": "books"}'])
async def test_an_entry_that_cannot_be_read_is_a_miss(stack, body):
    """An answer that another version wrote, or that is broken, is made anew."""
    await stack.search()

    async def get(_key: str) -> CacheEntry:
        return CacheEntry(SEQ, 0.0, body)

    stack.cache.get = get
    reply = await stack.search()
    assert (reply.cache.hit, ids(reply)) == (False, ["d", "c", "b", "a"])


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
