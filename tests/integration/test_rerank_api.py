"""The rerank service's API, whole and in this process: routes, partial answers, bad input, and metrics."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from services.common.wire.base import MAX_INPUT_CHARS
from services.rerank.app import create_app
from services.rerank.settings import RerankSettings
from tests.integration.conftest import JSON, UNREADABLE, Refused, Serve

QUERY = "red green blue white"
DOCUMENTS = ["red", "red green blue", "black", "red green"]
SCORES = {0: 0.25, 1: 0.75, 2: 0.0, 3: 0.5}
ORDER = [1, 3, 0, 2]


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service with the fake scorer."""
    async with serve(create_app(RerankSettings(model="fake"))) as client:
        yield client


async def rerank(client: httpx2.AsyncClient, path: str = "/rerank", **body) -> dict:
    """Rerank, which must succeed."""
    response = await client.post(path, json={"query": QUERY, "documents": DOCUMENTS, **body})
    assert response.status_code == 200, response.text
    return response.json()


# --- routes ---------------------------------------------------------------------------------------------------------


async def test_rerank_answers_best_first(client):
    """Documents come by falling score with their place in the request; no text comes unasked."""
    reply = await rerank(client)
    results = [(result["index"], result["score"], result["scored"]) for result in reply["results"]]
    assert results == [(index, SCORES[index], True) for index in ORDER]
    assert not any("text" in result for result in reply["results"])
    assert (reply["model"], reply["fingerprint"]) == ("fake", "fake-rerank@1")
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] == 4 * 4 + 7
    assert set(reply["timings"]) == {"tokenization_ms", "queue_ms", "inference_ms"}


async def test_equal_scores_keep_the_order_given(client):
    """Ties stay as the caller ranked them."""
    reply = await rerank(client, documents=["none", "red", "nothing", "red"])
    assert [result["index"] for result in reply["results"]] == [1, 3, 0, 2]


async def test_top_n_and_documents(client):
    """top_n cuts the answer, return_documents adds the text."""
    reply = await rerank(client, top_n=2, return_documents=True)
    assert [(result["index"], result["text"]) for result in reply["results"]] == [
        (1, "red green blue"),
        (3, "red green"),
    ]
    assert len((await rerank(client, top_n=100))["results"]) == 4


async def test_documents_may_be_objects(client):
    """A document is a string or an object with a text, also mixed."""
    reply = await rerank(client, documents=["red", {"text": "red green blue"}, {"text": "black"}, "red green"])
    assert [result["index"] for result in reply["results"]] == ORDER


async def test_an_empty_document_is_scored(client):
    """A document without text has its place in the answer."""
    reply = await rerank(client, documents=["", "red"])
    assert [(result["index"], result["score"]) for result in reply["results"]] == [(1, 0.25), (0, 0.0)]


async def test_at_the_deadline_the_rest_is_marked(client):
    """Natively a deadline that passes leaves documents unscored in the order given; for other clients it is 504."""
    documents = ["red"] * 1000
    body = {"query": QUERY, "documents": documents}
    late = {"x-deadline-ms": "0.001"}
    reply = (await client.post("/rerank", json=body, headers=late)).json()
    unscored = [result for result in reply["results"] if not result["scored"]]
    assert unscored
    assert all("score" not in result for result in unscored)
    assert sorted(result["index"] for result in reply["results"]) == list(range(1000))
    assert [result["index"] for result in unscored] == sorted(result["index"] for result in unscored)
    for path, more in (("/rerank", {"allow_partial": False}), ("/v1/rerank", {})):
        response = await client.post(path, json={**body, **more}, headers=late)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_the_scorer_is_described(client):
    """/models and /info name it, and say what a score is made of."""
    assert [card["id"] for card in (await client.get("/models")).json()["data"]] == ["fake"]
    info = (await client.get("/info")).json()
    assert (info["model"], info["kind"], info["fingerprint"]) == ("fake", "fake", "fake-rerank@1")
    assert "share of the query's words" in info["score"]


async def test_the_most_documents_allowed(client):
    """1,000 documents in one request, the documented limit, are answered."""
    assert len((await rerank(client, documents=["red"] * 1000))["results"]) == 1000


async def test_health_and_documentation(client):
    """The health routes answer, and the API documents itself."""
    assert (await client.get("/livez")).json() == {"status": "ok", "problems": []}
    assert (await client.get("/readyz")).json() == {"status": "ok", "problems": []}
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/rerank", "/models", "/info", "/livez", "/readyz", "/metrics"} <= set(paths)
    assert {"/v1/rerank", "/v2/rerank", "/v1/models", "/score", "/tei/rerank", "/tei/predict", "/tei/info"} <= set(
        paths
    )


async def test_metrics_are_there_from_the_start(client):
    """Before any traffic /metrics has the series that alerts and dashboards need."""
    text = (await client.get("/metrics")).text
    for series in (
        'tercet_service_info{service="rerank"} 1.0',
        'tercet_rerank_tokens_total{lane="query"}',
        'tercet_rerank_tokens_total{lane="bulk"} 0.0',
        "tercet_rerank_query_queue_items 0.0",
        "tercet_rerank_bulk_queue_items 0.0",
        "tercet_rerank_inference_seconds_count",
        'tercet_errors_total{code="deadline_exceeded"} 0.0',
    ):
        assert f"\n{series}" in text, series


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_FIELDS = [
    ("no query", {"query": None}, "query", 422),
    ("an empty query", {"query": ""}, "query", 422),
    ("a blank query", {"query": " \n"}, "query", 422),
    ("a null byte in the query", {"query": "a\0"}, "query", 422),
    ("a query over the limit", {"query": "x" * 32_769}, "query", 422),
    ("a query of 10 MB", {"query": "x" * 10_000_000}, "query", 422),
    ("a number for the query", {"query": 5}, "query", 422),
    ("no documents", {"documents": []}, "documents", 422),
    ("null for documents", {"documents": None}, "documents", 422),
    ("a string for documents", {"documents": "red"}, "documents", 422),
    ("1,001 documents", {"documents": ["a"] * 1001}, "documents", 422),
    ("a number among documents", {"documents": ["a", 5]}, "documents.1", 422),
    ("a null byte in a document", {"documents": ["a", "b\0"]}, "documents.1", 422),
    ("a null byte in an object", {"documents": [{"text": "\0"}]}, "documents.0.text", 422),
    ("an object without text", {"documents": ["a", {}]}, "documents.1.text", 422),
    ("an object with more", {"documents": [{"text": "a", "id": 1}]}, "documents.0.id", 422),
    ("a number for a text", {"documents": [{"text": 5}]}, "documents.0.text", 422),
    ("a document over the limit", {"documents": ["x" * (MAX_INPUT_CHARS + 1)]}, "documents.0", 422),
    ("a document of 10 MB", {"documents": ["a", "x" * 10_000_000]}, "documents.1", 422),
    ("top_n 0", {"top_n": 0}, "top_n", 422),
    ("top_n negative", {"top_n": -1}, "top_n", 422),
    ("top_n a string", {"top_n": "2"}, "top_n", 422),
    ("top_n a fraction", {"top_n": 1.5}, "top_n", 422),
    ("return_documents a string", {"return_documents": "yes"}, "return_documents", 422),
    ("an unknown model", {"model": "other"}, "model", 404),
    ("an unknown field", {"colour": "red"}, "colour", 422),
]


@pytest.mark.parametrize(
    ("fields", "param", "status"), [row[1:] for row in BAD_FIELDS], ids=[row[0] for row in BAD_FIELDS]
)
async def test_bad_fields_are_refused_by_name(client, refused: Refused, fields, param, status):
    """Each bad field is a 4xx that names it, and the service goes on."""
    got, error = await refused("/rerank", {"query": QUERY, "documents": DOCUMENTS, **fields})
    assert (got, error["param"]) == (status, param)
    assert len((await rerank(client))["results"]) == 4


@pytest.mark.parametrize("missing", ["query", "documents"])
async def test_missing_fields_are_named(refused: Refused, missing):
    """A request without query or documents is told which."""
    body = {"query": QUERY, "documents": DOCUMENTS}
    del body[missing]
    status, error = await refused("/rerank", body)
    assert (status, error["param"]) == (422, missing)


@pytest.mark.parametrize("body", [row[1] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
async def test_unreadable_bodies_are_malformed(client, refused: Refused, body):
    """What is no JSON object in UTF-8 is 400, and the service goes on."""
    status, error = await refused("/rerank", body)
    assert (status, error["code"], error["param"]) == (400, "malformed_request", "body")
    assert len((await rerank(client))["results"]) == 4


async def test_a_body_over_the_limit(serve: Serve):
    """A body over max_body_bytes is 413, whether its length is stated or it comes in chunks."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async with serve(create_app(RerankSettings(model="fake", max_body_bytes=10_000))) as client:
        for content in (b"x" * 10_001, chunks()):
            response = await client.post("/rerank", content=content, headers=JSON)
            assert (response.status_code, response.json()["error"]["param"]) == (413, "body")
        assert len((await rerank(client))["results"]) == 4


# --- the real scorer ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_default_scorer_ranks_and_says_what_it_is(serve: Serve):
    """The packaged cross-encoder behind late interaction puts the answer first, and /info says what both are."""
    async with serve(create_app(RerankSettings(precision="fp32", device="cpu"))) as client:
        info = (await client.get("/info")).json()
        assert (info["model"], info["kind"]) == ("tercet-reranker", "cascade")
        assert "fitted" in info["score"]
        assert "untrained" in info["score"]
        query = "How do plants make energy from light?"
        documents = ["Stocks fell on Monday.", "Photosynthesis turns light into energy in plants.", "A plant for cars."]
        reply = await rerank(client, query=query, documents=documents)
        assert reply["results"][0]["index"] == 1
        assert all(0.0 <= result["score"] <= 1.0 for result in reply["results"])
        raw = await rerank(client, query=query, documents=documents, raw_scores=True)
        assert [result["index"] for result in raw["results"]] == [result["index"] for result in reply["results"]]
        assert raw["results"][0]["score"] != reply["results"][0]["score"]
        assert raw["query_truncated"] is False
        assert (await rerank(client, query="light " * 2000, documents=documents))["query_truncated"] is True
