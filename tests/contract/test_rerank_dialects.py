"""
The rerank service's routes over plain HTTP: what each is sent and answers, native and as Cohere, Jina and vLLM.

The scorer counts words, so that every score, window and offset is known; the app around it is the service's own.
"""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from services.common.batching import Lane
from services.common.wire.rerank import NativeRerankRequest, RerankReply
from services.common.wire.rerank_dialects import CohereRerankRequest, ScoreRequest
from services.rerank.routes import lane_of
from tests.contract.rerank_words import (
    BEST,
    DOCUMENTS,
    LATE,
    LONG,
    LONG_QUERY,
    ORDER,
    QUERY,
    SCORES,
    WordBackend,
    app_of,
    post,
)
from tests.integration.conftest import serving


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service with the words scorer, which reads 12 tokens at once."""
    async with serving(app_of(WordBackend())) as client:
        yield client


# --- native -------------------------------------------------------------------------------------------------------


async def test_native_results_tell_what_was_read(client):
    """Score, windows, the best passage in characters, and which stage had the last word; `text` only when asked for."""
    reply = await post(client, "/rerank", {"query": QUERY, "documents": DOCUMENTS})
    assert reply["results"] == [
        {
            "index": index,
            "score": score,
            "scored": True,
            "passages_scored": 1,
            "best_passage": {"start": 0, "end": len(DOCUMENTS[index])},
            "complete": True,
            "stage": "last",
        }
        for index, score in zip(ORDER, SCORES, strict=True)
    ]
    assert (reply["model"], reply["fingerprint"], reply["query_truncated"]) == ("words", "words@1", False)
    tokens = 4 * (2 + 3) + 1 + 6 + 0 + 1
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "cached_tokens": 0}
    assert set(reply["timings"]) == {"tokenization_ms", "queue_ms", "inference_ms"}


async def test_a_long_document_counts_by_its_best_window(client):
    """Windows cover all of it; the reply says how many, and where the best is in the text."""
    result = (await post(client, "/rerank", {"query": QUERY, "documents": [LONG]}))["results"][0]
    assert (result["score"], result["passages_scored"]) == (1.0, 5)
    assert LONG[result["best_passage"]["start"] : result["best_passage"]["end"]] == BEST


async def test_known_scores_are_told_in_usage(client):
    """Tokens of pairs that were scored before count as cached, whichever route they came by; the others do not."""
    await post(client, "/v2/rerank", {"query": QUERY, "documents": DOCUMENTS, "max_tokens_per_doc": None})
    reply = await post(client, "/rerank", {"query": QUERY, "documents": [*DOCUMENTS, "a new one"]})
    assert reply["usage"] == {"prompt_tokens": 36, "total_tokens": 36, "cached_tokens": 28}


async def test_only_the_beginning_of_long_documents_on_request(client):
    """`long_documents: first` reads one window; `max_document_tokens` cuts before windows are made."""
    body = {"query": QUERY, "documents": [LONG]}
    first = (await post(client, "/rerank", {**body, "long_documents": "first"}))["results"][0]
    assert (first["score"], first["passages_scored"]) == (0.0, 1)
    cut = (await post(client, "/rerank", {**body, "max_document_tokens": 15}))["results"][0]
    assert (cut["score"], cut["passages_scored"]) == (0.5, 3)
    both = {"long_documents": "windows", "max_document_tokens": 5}
    assert (await post(client, "/rerank", {**body, **both}))["results"][0]["passages_scored"] == 1


async def test_the_setting_says_how_long_documents_are_read():
    """What a request leaves open is the service's to say; a request that says it has its way."""
    async with serving(app_of(WordBackend(), long_documents="first")) as client:
        body = {"query": QUERY, "documents": [LONG]}
        assert (await post(client, "/rerank", body))["results"][0]["passages_scored"] == 1
        windows = await post(client, "/rerank", {**body, "long_documents": "windows"})
        assert windows["results"][0]["passages_scored"] == 5
        assert (await client.get("/info")).json()["long_documents"] == "first"


async def test_a_query_that_is_cut_has_a_receipt(client):
    """Over half of what the model reads only the beginning of a query is used: natively a flag, for Cohere a warning."""
    body = {"query": LONG_QUERY, "documents": ["black", "red"]}
    native = await post(client, "/rerank", body)
    assert native["query_truncated"] is True
    assert [result["score"] for result in native["results"]] == pytest.approx([1 / 6, 0.0])
    for path in ("/v1/rerank", "/v2/rerank"):
        (warning,) = (await post(client, path, body))["meta"]["warnings"]
        assert "query" in warning
        assert "warnings" not in (await post(client, path, {"query": QUERY, "documents": ["red"]}))["meta"]


async def test_raw_scores_keep_the_order(client):
    """The model's own scores on request, natively and in each dialect that can ask for them."""
    body = {"query": QUERY, "documents": DOCUMENTS}
    native = await post(client, "/rerank", {**body, "raw_scores": True})
    assert [result["score"] for result in native["results"]] == [10.0, 5.0, 0.0, 0.0]
    vllm = await post(client, "/v1/rerank", {**body, "use_activation": False})
    assert [result["relevance_score"] for result in vllm["results"]] == [10.0, 5.0, 0.0, 0.0]
    scores = await post(client, "/score", {"text_1": QUERY, "text_2": DOCUMENTS, "use_activation": False})
    assert [item["score"] for item in scores["data"]] == [5.0, 10.0, 0.0, 0.0]
    tei = await post(client, "/tei/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True})
    assert [rank["score"] for rank in tei] == [10.0, 5.0, 0.0, 0.0]


async def test_the_scorer_and_its_limits_are_described(client):
    """`/info` says what runs, what a score is made of and what is refused; the model is listed in both places."""
    info = (await client.get("/info")).json()
    assert (info["model"], info["kind"], info["max_tokens"], info["labels"]) == ("words", "fake", 12, [])
    assert info["ranks"] is True
    assert (info["limits"]["max_documents"], info["limits"]["max_document_chars"]) == (1000, 8_000_000)
    for path in ("/models", "/v1/models"):
        reply = (await client.get(path)).json()
        assert (reply["object"], [card["id"] for card in reply["data"]]) == ("list", ["words"])
        assert reply["data"][0]["object"] == "model"


# --- /v1/rerank and /v2/rerank ------------------------------------------------------------------------------------


async def test_the_superset_reply(client):
    """Jina's, Cohere v1's and vLLM's keys at once; `document` is left out unless it is asked for."""
    body = {"query": QUERY, "documents": DOCUMENTS, "model": "words"}
    reply = await post(client, "/v1/rerank", body)
    assert set(reply) == {"id", "model", "results", "usage", "meta"}
    assert reply["results"] == [
        {"index": index, "relevance_score": score} for index, score in zip(ORDER, SCORES, strict=True)
    ]
    assert (reply["model"], reply["usage"]) == ("words", {"prompt_tokens": 28, "total_tokens": 28})
    assert reply["meta"] == {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    assert isinstance(reply["id"], str)
    shown = await post(client, "/v1/rerank", {**body, "return_documents": True, "top_n": 2})
    assert [result["document"] for result in shown["results"]] == [{"text": DOCUMENTS[index]} for index in ORDER[:2]]
    hidden = await post(client, "/v1/rerank", {**body, "return_documents": None, "top_n": None})
    assert hidden["results"] == reply["results"]


async def test_cohere_v2s_reply(client):
    """Three keys, and the version; a search unit for each hundred documents begun."""
    reply = await post(client, "/v2/rerank", {"model": "words", "query": QUERY, "documents": DOCUMENTS, "top_n": 1})
    assert set(reply) == {"id", "results", "meta"}
    assert reply["results"] == [{"index": 1, "relevance_score": 1.0}]
    assert reply["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    many = await post(client, "/v2/rerank", {"model": "words", "query": QUERY, "documents": ["red"] * 101})
    assert many["meta"]["billed_units"] == {"search_units": 2}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
async def test_objects_are_ranked_by_their_text_or_by_rank_fields(client, path):
    """Fields count in the order asked for, each on a line of its own; an object comes back whole, always with a text."""
    documents = [
        {"text": "black", "title": "red green", "year": 1999, "more": {"note": None, "tags": ["a"]}},
        {"text": "green", "title": "white"},
        "red",
    ]
    body = {"query": QUERY, "documents": documents, "return_documents": True}
    by_text = await post(client, path, body)
    assert [(result["index"], result["relevance_score"]) for result in by_text["results"]] == [
        (1, 0.5),
        (2, 0.5),
        (0, 0),
    ]
    assert by_text["results"][2]["document"] == documents[0]
    by_fields = await post(client, path, {**body, "rank_fields": ["title", "text"]})
    assert [result["relevance_score"] for result in by_fields["results"]] == [1.0, 0.5, 0.5]
    assert by_fields["results"][0]["document"] == documents[0]
    without = await post(client, path, {**body, "documents": [{"title": "red", "n": 1}], "rank_fields": ["title"]})
    assert without["results"][0]["document"] == {"text": "red", "title": "red", "n": 1}


def test_rank_fields_are_joined_by_lines():
    """What is scored of an object is its fields' texts, in the order of `rank_fields`."""
    document = {"author": "b", "title": "a", "text": "c"}
    request = CohereRerankRequest(query="q", documents=[document, "d"], rank_fields=["title", "text"])
    assert request.texts() == ["a\nc", "d"]


async def test_top_n_of_nothing_is_everything(client):
    """As at vLLM 0 is no limit; more than there are is all."""
    for top_n in (0, 4, 5, 10_000, None):
        reply = await post(client, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": top_n})
        assert [result["index"] for result in reply["results"]] == ORDER


@pytest.mark.parametrize(
    ("path", "options", "score"),
    [
        ("/v1/rerank", {}, 1.0),
        ("/v2/rerank", {}, 1.0),
        ("/v1/rerank", {"truncate_prompt_tokens": -1}, 0.0),
        ("/v1/rerank", {"truncate_prompt_tokens": 10_000}, 0.0),
        ("/v1/rerank", {"max_chunks_per_doc": 1}, 0.0),
        ("/v1/rerank", {"max_chunks_per_doc": 2}, 1.0),
        ("/v1/rerank", {"max_tokens_per_doc": 15}, 0.5),
        ("/v2/rerank", {"max_tokens_per_doc": 15}, 0.5),
        ("/v2/rerank", {"max_tokens_per_doc": 0}, 1.0),
        ("/v2/rerank", {"max_tokens_per_doc": None, "priority": 3}, 1.0),
        ("/v1/rerank", {"max_tokens_per_doc": 15, "truncate_prompt_tokens": -1}, 0.0),
        ("/v1/rerank", {"priority": -1, "unknown": 1}, 1.0),
    ],
    ids=str,
)
async def test_how_much_of_a_long_document_is_read(client, path, options, score):
    """Windows unless one is asked for (by vLLM's truncation or one chunk); limits in tokens cut before."""
    reply = await post(client, path, {"query": QUERY, "documents": [LONG], **options})
    assert reply["results"][0]["relevance_score"] == score


def test_limits_in_tokens_the_least_of_them_counts():
    """A chunk is as long as what the model reads; Cohere v2 has a limit of its own when none is given."""

    def limit(**options: Any) -> int | None:
        return CohereRerankRequest(query="q", documents=["d"], **options).document_tokens(100)

    assert limit() is None
    assert limit(max_chunks_per_doc=3) == 300
    assert limit(max_chunks_per_doc=3, max_tokens_per_doc=50) == 50
    assert limit(truncate_prompt_tokens=20, max_tokens_per_doc=50) == 20
    assert limit(truncate_prompt_tokens=-1, max_tokens_per_doc=0) is None


async def test_relevant_spans_on_request(client):
    """Cohere v2's clients may ask where the relevant text is: the best passage, if its score is over the threshold."""

    async def spans(**asked: Any) -> list[Any]:
        body = {"query": QUERY, "documents": [LONG, "black"], "relevant_spans": asked}
        return [result.get("relevant_spans") for result in (await post(client, "/v2/rerank", body))["results"]]

    start = LONG.index(BEST)
    expected = [{"start": start, "end": start + len(BEST), "score": 1.0}]
    assert await spans(mode="enabled") == [expected, None]
    assert await spans(mode="enabled", threshold=0, max_spans=3) == [expected, [{"start": 0, "end": 5, "score": 0.0}]]
    assert await spans(mode="enabled", max_spans=0) == [None, None]
    assert await spans(mode="disabled") == [None, None]


def test_work_that_can_wait_is_bulk():
    """A priority above 0, or more than a hundred documents, let others go first."""
    assert lane_of(100) is Lane.QUERY
    assert lane_of(101) is lane_of(1, can_wait=True) is Lane.BULK
    for priority, can_wait in ((None, False), (0, False), (-1, False), (1, True)):
        assert ScoreRequest(text_1="a", text_2="b", priority=priority).can_wait is can_wait


# --- /score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
async def test_scores_of_one_query_with_each_document(client, path, names):
    """In the order given, under each of the names that vLLM has for the two."""
    reply = await post(client, path, {names[0]: QUERY, names[1]: DOCUMENTS, "model": "words"})
    assert set(reply) == {"id", "object", "created", "model", "data", "usage"}
    assert (reply["object"], reply["model"]) == ("list", "words")
    assert reply["data"] == [
        {"index": index, "object": "score", "score": score} for index, score in enumerate([0.5, 1.0, 0.0, 0.0])
    ]
    assert reply["usage"] == {"prompt_tokens": 28, "total_tokens": 28}


async def test_scores_of_pairs(client):
    """As many queries as documents are scored one with one, equal queries together; a single pair is two strings."""
    queries = ["red", "green", "red", "blue"]
    reply = await post(client, "/score", {"queries": queries, "documents": ["red", "red", "green", "blue sky"]})
    assert [item["score"] for item in reply["data"]] == [1.0, 0.0, 0.0, 1.0]
    one = await post(client, "/score", {"text_1": "red", "text_2": "red one"})
    assert [item["score"] for item in one["data"]] == [1.0]
    assert (await post(client, "/score", {"text_1": ["red"], "text_2": ["red", ""]}))["data"][1]["score"] == 0.0


async def test_a_pair_that_fails_fails_all(client):
    """With as many queries as documents the first failure is the answer, in the one shape of errors."""
    body = {"queries": ["red", "green"], "documents": ["a", "b"]}
    response = await client.post("/score", json=body, headers=LATE)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


# --- errors in each dialect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
async def test_errors_have_the_keys_that_clients_look_for(client, path):
    """Cohere's clients read `message`, Jina's `detail`, vLLM's `error`: the same text under each."""
    response = await client.post(path, json={"query": QUERY, "documents": DOCUMENTS, "model": "rerank-v3.5"})
    body = response.json()
    assert (response.status_code, body["error"]["code"], body["error"]["param"]) == (404, "not_found", "model")
    assert set(body) == {"error", "message", "detail"}
    assert body["message"] == body["detail"] == body["error"]["message"]
    assert "words" in body["message"]


async def test_a_deadline_that_passes_in_each_dialect(client):
    """Only the native route has partial answers; elsewhere it is 504."""
    native = await post(client, "/rerank", {"query": QUERY, "documents": ["a"]}, headers=LATE)
    assert native["results"] == [{"index": 0, "scored": False}]
    for path in ("/v1/rerank", "/v2/rerank"):
        response = await client.post(path, json={"query": QUERY, "documents": ["b"]}, headers=LATE)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    tei = await client.post("/tei/rerank", json={"query": QUERY, "texts": ["c"]}, headers=LATE)
    assert (tei.status_code, tei.json()["error_type"]) == (504, "Overloaded")


async def test_a_service_that_starts_is_not_ready_in_each_dialect():
    """Before the model is there everything is 503, in TEI's words under /tei."""
    transport = httpx2.ASGITransport(app=app_of(WordBackend()))
    async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
        for response in (
            await client.get("/tei/health"),
            await client.post("/tei/rerank", json={"query": "a", "texts": ["b"]}),
        ):
            assert (response.status_code, response.json()["error_type"]) == (503, "Unhealthy")
        response = await client.post("/v2/rerank", json={"query": "a", "documents": ["b"]})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")


# --- search, as a client of other versions ------------------------------------------------------------------------


def test_search_and_rerank_may_be_of_different_versions():
    """What search sends names no option that an older service would refuse; a reply without the newer fields is read."""
    sent = NativeRerankRequest(query="q", documents=["d"]).model_dump(exclude_none=True)
    assert set(sent) == {"query", "documents", "return_documents", "raw_scores", "allow_partial"}
    older = {
        "results": [{"index": 0, "score": 0.5, "scored": True}, {"index": 1, "scored": False}],
        "model": "m",
        "fingerprint": "f",
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
        "timings": {"tokenization_ms": 0.0, "queue_ms": 0.0, "inference_ms": 0.0},
    }
    reply = RerankReply.model_validate(older)
    assert [result.score for result in reply.results] == [0.5, None]
    assert (reply.query_truncated, reply.usage.cached_tokens) == (False, 0)
    assert RerankReply.model_validate({**older, "newer": 1}) == reply
