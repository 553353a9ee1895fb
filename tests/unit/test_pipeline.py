"""The read path over ports that are dictionaries: what each mode runs, paging, and what is refused."""

from dataclasses import replace

import pytest

from services.common.errors import Conflict, DeadlineExceeded, DependencyUnavailable, InvalidInput, NotFound
from services.search.ports import LexicalStatistics
from tests.search_ports import MODEL, SEQ, Stack, ids, make_stack


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


async def test_all_stages_run(stack):
    """A search embeds, retrieves by both, fuses, reranks, and says so; nothing is degraded."""
    reply = await stack.search()
    assert ids(reply) == ["d", "c", "b", "a"]
    assert (reply.pipeline.retrieval, reply.pipeline.rerank) == ("hybrid", "ranker")
    assert (reply.degraded, reply.coverage.ratio, reply.as_of, reply.cache.hit) == ([], 1.0, SEQ, False)
    assert (reply.collection, reply.request_id) == ("books", "r-1")
    assert {"embed", "retrieve", "rerank", "total", "dense"} <= set(reply.timings_ms)
    top = reply.hits[0]
    assert (top.text, top.title, top.metadata, top.vector) == ("text of d", "title d", {"n": 1}, None)
    assert (top.score_kind, top.stages.dense, top.stages.bm25, top.stages.rerank) == ("blended", 0.1, 2.0, 0.9)
    assert stack.reranker.asked == [
        ["title b\ntext of b", "title a\ntext of a", "title c\ntext of c", "title d\ntext of d"]
    ]


async def test_the_default_collection_is_meant_when_none_is_named(stack):
    """A search without a collection goes to the default one."""
    assert (await stack.search(collection=None)).collection == "books"


async def test_an_unknown_collection_is_not_found(stack):
    """The error names the field and the collections there are."""
    with pytest.raises(NotFound, match=r"films.*books, own") as caught:
        await stack.search(collection="films")
    assert caught.value.param == "collection"


@pytest.mark.parametrize(
    ("mode", "order", "kind", "embeds"),
    [
        ("hybrid", ["b", "a", "c", "d"], "fused", 1),
        ("dense", ["a", "b", "c", "d"], "dense", 1),
        ("lexical", ["b", "d", "a"], "bm25", 0),
    ],
)
async def test_a_mode_runs_its_retrievers_alone(stack, mode, order, kind, embeds):
    """Dense and lexical are ranked by their own score; a lexical search asks no model."""
    reply = await stack.search(mode=mode, rerank=False)
    assert ids(reply) == order
    assert {hit.score_kind for hit in reply.hits} == {kind}
    assert (reply.pipeline.retrieval, reply.pipeline.rerank) == (mode, None)
    assert len(stack.embedding.asked) == embeds
    assert stack.reranker.asked == []


async def test_poor_word_matches_lose_to_the_vectors(stack):
    """The collection's statistics tell fusion how much of what was asked the best word match has."""
    assert ids(await stack.search(rerank=False, cache=False)) == ["b", "a", "c", "d"]
    rare = LexicalStatistics(1_000_000, {"why": 1})
    stack.retriever.answer = replace(stack.retriever.answer, terms=("why",) * 9, statistics=rare)
    assert ids(await stack.search(rerank=False, cache=False)) == ["a", "b", "c", "d"]


async def test_a_query_vector_replaces_the_embedding(stack):
    """With query_vector no model is asked, and the vector is brought to unit length."""
    await stack.search(query_vector=[3.0, 4.0])
    assert stack.embedding.asked == []
    assert stack.retriever.queries[0].vector == pytest.approx([0.6, 0.8])


async def test_include_says_what_a_hit_carries(stack):
    """Text, metadata and vector come when they are asked for."""
    (hit, *_) = (await stack.search(include=["vector"])).hits
    assert (hit.text, hit.metadata, hit.vector) == (None, None, pytest.approx([0.6, 0.8]))
    (hit, *_) = (await stack.search(include=[])).hits
    assert (hit.text, hit.metadata, hit.vector) == (None, None, None)


@pytest.mark.parametrize(("offset", "k", "page"), [(0, 2, ["d", "c"]), (1, 2, ["c", "b"]), (3, 10, ["a"]), (4, 2, [])])
async def test_pages_are_windows_of_one_order(stack, offset, k, page):
    """offset and k cut the page from the last order."""
    assert ids(await stack.search(offset=offset, k=k)) == page


async def test_a_deep_page_widens_retrieval(stack):
    """Retrievers propose at least as many candidates as the page needs."""
    await stack.search(offset=300, k=20)
    await stack.search(candidates=7, k=3)
    await stack.search(k=3)
    assert [query.limit for query in stack.retriever.queries] == [320, 7, 50]


async def test_only_the_first_candidates_are_reranked(stack):
    """What the reranker was not given follows in retrieval order."""
    reply = await stack.search(rerank_candidates=2)
    assert len(stack.reranker.asked[0]) == 2
    assert ids(reply) == ["b", "a", "c", "d"]
    assert [hit.stages.rerank for hit in reply.hits] == [0.2, 0.1, None, None]
    assert reply.degraded == []


async def test_a_shard_that_cannot_be_read_is_waited_for_once(stack):
    """What it has is left out of the hits, flagged, and not asked for again after reranking."""
    stack.retriever.candidates = [replace(one, shard=int(one.id in "bd")) for one in stack.retriever.candidates]
    stack.retriever.hanging = [{1}, {1}]
    reply = await stack.search()
    assert (sorted(ids(reply)), reply.degraded) == (["a", "c"], ["shards_partial"])
    assert [sorted(asked) for asked in stack.retriever.fetched] == [["a", "b", "c", "d"]]


async def test_where_nothing_could_be_read_all_is_asked_for_again(stack):
    """Once: what is there then makes the answer, and what is not is an error that says whether time was all it took."""
    stack.retriever.hanging = [{0}]
    reply = await stack.search()
    assert (sorted(ids(reply)), reply.degraded) == (["a", "b", "c", "d"], [])
    stack.retriever.hanging = [{0}, {0}]
    with pytest.raises(DependencyUnavailable):
        await stack.search(query="another")
    stack.retriever.hanging, stack.retriever.late = [{0}, {0}], {0}
    with pytest.raises(DeadlineExceeded, match="before what was found could be read"):
        await stack.search(query="a third")


async def test_a_document_that_is_gone_is_left_out(stack):
    """A candidate that was deleted since it was found is in no answer, and the others keep their scores."""
    stack.retriever.gone = {"a"}
    reply = await stack.search()
    assert ids(reply) == ["d", "c", "b"]
    assert [hit.stages.rerank for hit in reply.hits] == [0.9, 0.3, 0.2]


# --- what is refused ------------------------------------------------------------------------------------------------


async def test_another_model_is_a_conflict(stack):
    """A collection is never searched with another model's vectors; both fingerprints are named."""
    stack.embedding.model_is = replace(MODEL, fingerprint="m@2")
    with pytest.raises(Conflict, match=r"m@1.*m@2") as caught:
        await stack.search()
    assert caught.value.param == "collection"
    assert stack.retriever.queries == []


@pytest.mark.parametrize("mode", ["hybrid", "dense"])
async def test_own_vector_collections_need_a_query_vector(stack, mode):
    """A collection without a model cannot embed a question."""
    with pytest.raises(InvalidInput, match="query_vector") as caught:
        await stack.search(collection="own", mode=mode)
    assert caught.value.param == "query_vector"
    assert stack.embedding.asked == []


async def test_own_vector_collections_answer_words_and_vectors(stack):
    """Lexical searches, and searches with a vector, work without a model."""
    assert (await stack.search(collection="own", mode="lexical")).hits
    assert (await stack.search(None, collection="own", mode="dense", query_vector=[1.0, 0.0])).hits
    assert stack.embedding.asked == []


@pytest.mark.parametrize("vector", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0]])
async def test_a_wrong_query_vector_is_refused(stack, vector):
    """A vector of another dimension, or without a direction, names its field."""
    with pytest.raises(InvalidInput) as caught:
        await stack.search(query_vector=vector)
    assert caught.value.param == "query_vector"


async def test_a_wrong_filter_is_refused_before_any_work(stack):
    """A filter that cannot be read asks no model and no shard."""
    with pytest.raises(InvalidInput):
        await stack.search(filter={"n": {"$near": 1}})
    assert stack.embedding.asked == []
    assert stack.retriever.queries == []


async def test_an_operation_of_the_future_cannot_be_waited_for(stack):
    """min_seq beyond the ledger is an error at once; one that the shards do not reach in time is flagged."""
    with pytest.raises(InvalidInput) as caught:
        await stack.search(min_seq=SEQ + 1)
    assert caught.value.param == "min_seq"
    stack.retriever.applied = False
    assert (await stack.search(min_seq=SEQ)).degraded == ["catching_up"]
