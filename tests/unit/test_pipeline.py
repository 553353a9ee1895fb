"""The read path over ports that are dictionaries: each step down with its flag, the cache, paging, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from services.common.deadline import Deadline
from services.common.errors import (
    Conflict,
    DeadlineExceeded,
    DependencyUnavailable,
    InvalidInput,
    NotFound,
    Overloaded,
)
from services.common.wire.search import SearchReply, SearchRequest
from services.search.cache import MemoryResultCache
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.pipeline import PipelineOptions, SearchPipeline
from services.search.ports import (
    CacheEntry,
    Candidate,
    Collection,
    CollectionState,
    Embedded,
    EmbeddingModel,
    LexicalStatistics,
    Reranked,
    RetrievalQuery,
    Retrieved,
    ShardDocument,
)

MODEL = EmbeddingModel("m", "m@1", 2)
BOOKS = Collection("uuid-books", "books", "m", "m@1", 2, 2, 0.0)
OWN = Collection("uuid-own", "own", None, OWN_VECTORS, 2, 2, 0.0)
SEQ = 9


def found(id_: str, dense: float | None = None, bm25: float | None = None) -> Candidate:
    """Return a candidate of shard 0."""
    return Candidate(id_, 0, 0, dense, bm25)


class MemoryLedger:
    """The part of a ledger that searches read."""

    def __init__(self) -> None:
        self.collections = {collection.name: collection for collection in (BOOKS, OWN)}
        self.seq = SEQ

    async def find_collection(self, name: str) -> Collection | None:
        return self.collections.get(name)

    async def list_collections(self) -> list[Collection]:
        return list(self.collections.values())

    async def state(self, uuid: str) -> CollectionState:
        return CollectionState(self.seq, 4)


class MemoryRetriever:
    """Answers with the candidates it is given, by what the query asks for; *gone* documents cannot be fetched."""

    def __init__(self) -> None:
        self.candidates = [found("a", 0.9, 1.0), found("b", 0.8, 4.0), found("c", 0.7), found("d", 0.1, 2.0)]
        self.gone: set[str] = set()
        self.answer = Retrieved((), 2, 2, 0, {}, 0, SEQ, {"dense": 1.0})
        self.queries: list[RetrievalQuery] = []
        self.fetched: list[list[str]] = []
        self.applied = True

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        self.queries.append(query)
        candidates = [
            replace(one, dense=one.dense if query.vector is not None else None, bm25=one.bm25 if query.text else None)
            for one in self.candidates
            if query.vector is not None or (query.text and one.bm25 is not None)
        ]
        return replace(self.answer, candidates=candidates if self.answer.ok else ())

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        self.fetched.append([one.id for one in candidates])
        vector = np.array([0.6, 0.8], dtype=np.float32) if vectors else None
        return {
            one.id: ShardDocument(one.id, f"text of {one.id}", f"title {one.id}", {"n": 1}, vector)
            for one in candidates
            if one.id not in self.gone
        }

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        return self.applied

    async def applied_seq(self, collection: Collection) -> int:
        return SEQ


class Embedding:
    """Gives every text the same vector, or raises *error*."""

    def __init__(self) -> None:
        self.model_is = MODEL
        self.error: Exception | None = None
        self.asked: list[tuple[str, Deadline]] = []

    async def embed_query(self, text: str, deadline: Deadline) -> Embedded:
        self.asked.append((text, deadline))
        if self.error:
            raise self.error
        return Embedded(np.array([[1.0, 0.0]], dtype=np.float32), self.model_is)


class Reranker:
    """Scores texts by a table (`text of d` is best), or raises *error*."""

    def __init__(self) -> None:
        self.scores: dict[str, float | None] = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.9}
        self.error: Exception | None = None
        self.asked: list[list[str]] = []

    async def rerank(self, query: str, texts: Sequence[str], deadline: Deadline) -> Reranked:
        self.asked.append(list(texts))
        if self.error:
            raise self.error
        return Reranked([self.scores[text[-1]] for text in texts], "ranker", "r@1")


class BrokenCache:
    """A cache that is out of reach."""

    available = False

    async def get(self, key: str) -> CacheEntry | None:
        return None

    async def put(self, key: str, entry: CacheEntry) -> None:
        raise AssertionError("nothing is put into a cache that is out of reach")


class Stack(SimpleNamespace):
    """The pipeline with the ports it stands on."""

    async def search(self, query: str | None = "why", *, timeout_s: float = 30.0, **fields) -> SearchReply:
        """Search the books."""
        request = SearchRequest(query=query, **{"collection": "books", **fields})
        return await self.pipeline.search(request, Deadline.after(timeout_s), request_id="r-1")


def make_stack(*, cache=None, **options) -> Stack:
    """Return a pipeline over fresh ports."""
    ledger, retriever, embedding, reranker = MemoryLedger(), MemoryRetriever(), Embedding(), Reranker()
    cache = cache or MemoryResultCache(max_bytes=1 << 20, ttl_s=60)
    catalog = Catalog(ledger, retriever, embedding, default_collection="books", default_shards=2)
    settings = {"candidates": 50, "rerank_candidates": 10, "dense_weight": 0.5, "rerank_blend": 1.0, **options}
    pipeline = SearchPipeline(catalog, ledger, retriever, embedding, reranker, cache, PipelineOptions(**settings))
    return Stack(
        ledger=ledger, retriever=retriever, embedding=embedding, reranker=reranker, cache=cache, pipeline=pipeline
    )


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


def ids(reply: SearchReply) -> list[str]:
    """Return the order of the hits."""
    return [hit.id for hit in reply.hits]


# --- all is well ----------------------------------------------------------------------------------------------------


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


async def test_a_document_that_is_gone_is_left_out(stack):
    """A candidate that was deleted since it was found is in no answer, and the others keep their scores."""
    stack.retriever.gone = {"a"}
    reply = await stack.search()
    assert ids(reply) == ["d", "c", "b"]
    assert [hit.stages.rerank for hit in reply.hits] == [0.9, 0.3, 0.2]


# --- steps down -----------------------------------------------------------------------------------------------------


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


async def test_each_stage_leaves_time_for_the_next(stack):
    """The embedding gets half of the time, so that a slow one leaves enough for the step down."""
    await stack.search(timeout_s=10.0)
    assert stack.embedding.asked[0][1].remaining_s() <= 5.0


# --- the cache ------------------------------------------------------------------------------------------------------


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
        {"collection": "own", "query_vector": [1.0, 0.0]},
    ],
    ids=lambda fields: next(iter(fields)),
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
