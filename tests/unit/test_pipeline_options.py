"""The options of a search over ports that are dictionaries: thresholds, groups, diversity, facets, highlights, explain."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from services.common.errors import Conflict, DependencyUnavailable, InvalidInput
from services.search.ports import LexicalStatistics
from tests.search_ports import BOOKS, MODEL, Stack, found, ids, make_stack


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


# --- what retrieval is asked


async def test_options_reach_the_shards(stack):
    """How words match, exactness and facets are the shards' to do; their plan is always asked for, as a log may want it."""
    await stack.search()
    await stack.search(
        lexical={"match": "phrase", "prefix": True, "stop_words": False}, exact=True, explain=True, facets={"n": 3}
    )
    plain, asked = stack.retriever.queries
    assert (plain.match, plain.prefix, plain.stop_words, plain.exact) == ("any", False, True, False)
    assert (asked.match, asked.prefix, asked.stop_words, asked.exact) == ("phrase", True, False, True)
    assert (plain.explain, asked.explain) == (True, True)
    assert (dict(plain.facets), dict(asked.facets)) == ({}, {"n": 3})


@pytest.mark.parametrize(("metric", "sent"), [("cosine", [0.6, 0.8]), ("dot", [3.0, 4.0]), ("l2", [3.0, 4.0])])
async def test_only_cosine_normalises_a_query_vector(stack, metric, sent):
    """The other metrics compare lengths too, so they take the vector as it is, with the words beside it."""
    stack.ledger.collections["books"] = replace(BOOKS, metric=metric)
    await stack.search(query_vector=[3.0, 4.0])
    assert stack.retriever.queries[0].vector == pytest.approx(sent)
    assert stack.retriever.queries[0].text == "why"


async def test_the_collections_model_embeds(stack):
    """A service without the collection's model is a conflict that names both; the same model by another name will do."""
    stack.embedding.names = {"other"}
    stack.embedding.model_is = replace(MODEL, name="other", fingerprint="other@1")
    with pytest.raises(Conflict, match=r"m@1.*other@1"):
        await stack.search()
    stack.embedding.model_is = replace(MODEL, name="other")
    assert (await stack.search()).degraded == []


async def test_an_unindexed_facet_is_refused(stack):
    """Where a collection declares its attributes, others cannot be counted; the field is named."""
    stack.ledger.collections["books"] = replace(BOOKS, attributes={"n": "number"})
    with pytest.raises(InvalidInput) as caught:
        await stack.search(facets={"n": 3, "colour": 3})
    assert caught.value.param == "facets.colour"
    assert stack.retriever.queries == []


# --- what is left out


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [("dense", 0.7, ["c", "b", "a"]), ("bm25", 2.0, ["d", "b"]), ("rerank", 0.2, ["d", "c", "b"])],
)
async def test_hits_below_the_threshold_are_left_out(stack, kind, value, kept):
    """Each stage's score has its threshold; a hit without that score is left out too."""
    reply = await stack.search(min_score={"kind": kind, "value": value})
    assert ids(reply) == kept
    assert all(getattr(hit.stages, kind) >= value for hit in reply.hits)


async def test_what_a_threshold_leaves_out_is_not_reranked(stack):
    """A threshold on a score of retrieval saves the reranker the work."""
    await stack.search(min_score={"kind": "dense", "value": 0.75})
    assert len(stack.reranker.asked[0]) == 2


@pytest.mark.parametrize(("part", "kind"), [("embedding", "dense"), ("reranker", "rerank")])
async def test_a_stage_that_is_down_leaves_nothing_out(stack, part, kind):
    """A threshold on a score that no hit can have now is passed over; the flag says that it was."""
    getattr(stack, part).error = DependencyUnavailable("down")
    reply = await stack.search(min_score={"kind": kind, "value": 0.5})
    assert len(reply.hits) >= 3
    assert len(reply.degraded) == 1


async def test_groups_fill_the_page(stack):
    """One hit, the best, for each value; documents without the field stand for themselves; pages do not overlap."""
    stack.retriever.metadata = {"d": {"of": 1}, "c": {"of": 1}, "b": {"of": 2}, "a": {}}
    assert ids(await stack.search(group_by="of")) == ["d", "b", "a"]
    assert ids(await stack.search(group_by="of", k=2)) == ["d", "b"]
    assert ids(await stack.search(group_by="of", k=2, offset=2)) == ["a"]


async def test_groups_read_no_further_than_they_need(stack):
    """Documents are fetched in growing steps down the order, each once, until there are enough groups."""
    stack.retriever.candidates = [found(f"{n:02}", 1 - n / 100) for n in range(40)]
    stack.retriever.metadata = {f"{n:02}": {"of": max(0, n - 3)} for n in range(40)}
    reply = await stack.search(mode="dense", rerank=False, group_by="of", k=2)
    assert ids(reply) == ["00", "04"]
    assert [len(part) for part in stack.retriever.fetched] == [2, 4]


async def test_diversity_moves_what_repeats(stack):
    """After the last order what says the same as a hit before it falls back; with groups, one of each is spread."""
    stack.retriever.vectors = {"d": [1, 0], "c": [1, 0], "b": [0, 1], "a": [1, 0]}
    assert ids(await stack.search(diversity=0.0)) == ["d", "c", "b", "a"]
    assert ids(await stack.search(diversity=0.7)) == ["d", "b", "c", "a"]
    stack.retriever.metadata = {"d": {"of": 1}, "c": {"of": 2}, "b": {"of": 1}, "a": {"of": 3}}
    assert ids(await stack.search(diversity=0.7, group_by="of")) == ["d", "c", "a"]


async def test_diversity_leaves_what_was_not_reranked(stack):
    """Scores of two kinds do not compare: what was not reranked keeps its place behind."""
    stack.retriever.vectors = {"b": [1, 0], "a": [1, 0], "c": [0, 1], "d": [0, 1]}
    assert ids(await stack.search(diversity=0.9, rerank_candidates=2)) == ["b", "a", "c", "d"]


# --- what is said


async def test_highlights_are_passages_with_marks(stack):
    """Each hit has its best passage and where the question's words are in it; none, where it has none of them."""
    stack.retriever.answer = replace(stack.retriever.answer, terms=("text", "d"))
    reply = await stack.search(include=["highlights"], highlights_max_chars=50)
    first = reply.hits[0].highlights[0]
    assert (first.text, first.marks) == ("text of d", [(0, 4), (8, 9)])
    assert reply.hits[0].text is None
    stack.retriever.answer = replace(stack.retriever.answer, terms=("absent",))
    assert (await stack.search("other", include=["highlights"])).hits[0].highlights == []
    assert (await stack.search()).hits[0].highlights is None


async def test_facets_are_the_shards_counts(stack):
    """Every field asked for is in the reply, with nothing where nothing was counted."""
    stack.retriever.answer = replace(stack.retriever.answer, facets={"n": {"1": 4}})
    assert (await stack.search(facets={"n": 3, "m": 3})).facets == {"n": {"1": 4}, "m": {}}
    assert (await stack.search()).facets is None


async def test_an_explanation_says_how_it_came_about(stack):
    """The plan of each shard, how many candidates each stage saw, and what the retrievers' scores weighed."""
    statistics = LexicalStatistics(1_000_000, {"why": 1})
    plans = {1: {"vectors": "hnsw"}, 0: {"vectors": "exact", "filter": {"estimated": 0.1, "true": 0.12}}}
    stack.retriever.answer = replace(stack.retriever.answer, plans=plans, terms=("why",), statistics=statistics)
    reply = await stack.search(explain=True, min_score={"kind": "dense", "value": 0.2}, rerank_candidates=2)
    assert [(each.shard, each.plan["vectors"]) for each in reply.explain.shards] == [(0, "exact"), (1, "hnsw")]
    counts = reply.explain.candidates
    assert (counts.total, counts.dense, counts.bm25, counts.reranked, counts.below_min_score) == (4, 4, 3, 2, 1)
    weights = reply.explain.fusion
    assert 0 < weights.bm25_confidence < 1
    assert (weights.method, weights.dense) == ("standardized", 0.5)
    assert weights.bm25 == pytest.approx(0.5 * weights.bm25_confidence, abs=1e-6)
    assert {"retrieve", "fuse", "rerank", "total"} <= set(reply.timings_ms)
    assert (await stack.search()).explain is None
    assert (await stack.search(mode="dense", explain=True)).explain.fusion is None


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"offset": 9_991}, "offset", "GET /collections/{collection}/documents"),
        ({"k": 1000, "offset": 9_001}, "offset", "at most 10,000"),
        ({"mode": "dense", "lexical": {}}, "lexical", "mode hybrid or lexical"),
        ({"mode": "dense", "include": ["highlights"]}, "include", "mode hybrid or lexical"),
        ({"mode": "lexical", "min_score": {"kind": "dense", "value": 0}}, "min_score.kind", "mode hybrid or dense"),
        ({"mode": "dense", "min_score": {"kind": "bm25", "value": 0}}, "min_score.kind", "mode hybrid or lexical"),
        ({"rerank": False, "min_score": {"kind": "rerank", "value": 0}}, "min_score.kind", "rerank: true"),
    ],
)
async def test_options_that_contradict_each_other_are_refused(stack, fields, param, says):
    """Each refusal names the field and the way out."""
    with pytest.raises(ValidationError) as caught:
        await stack.search(**fields)
    (error,) = caught.value.errors()
    assert error["ctx"]["param"] == param
    assert says in error["msg"]


async def test_the_deepest_page_is_allowed(stack):
    """offset + k reach 10,000, and retrieval is asked for as many."""
    assert (await stack.search(k=1000, offset=9000)).hits == []
    assert stack.retriever.queries[0].limit == 10_000
