"""TEI's dialect on the rerank service, over plain HTTP: rerank, predict, info and health."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.contract.rerank_words import DOCUMENTS, LONG, LONG_QUERY, ORDER, QUERY, SCORES, WordBackend, app_of, post
from tests.integration.conftest import serving


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service with the words scorer, which reads 12 tokens at once."""
    async with serving(app_of(WordBackend())) as client:
        yield client


TEI_HEADERS = (
    "x-compute-time",
    "x-compute-characters",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
)


@pytest.mark.parametrize("path", ["/tei/rerank", "/tei", "/tei/", "/tei/invocations"])
async def test_teis_bare_array(client, path):
    """Best first, `text` only when asked for, at TEI's addresses; its headers tell what was computed."""
    body = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": False, "truncate": None}
    response = await client.post(path, json=body)
    assert response.json() == [{"index": index, "score": score} for index, score in zip(ORDER, SCORES, strict=True)]
    assert response.headers["x-compute-type"] == "cpu+optimized"
    assert all(response.headers[name].isdecimal() for name in TEI_HEADERS)
    assert response.headers["x-compute-tokens"] == "28"
    assert int(response.headers["x-compute-characters"]) == 4 * len(QUERY) + sum(map(len, DOCUMENTS))
    shown = await post(client, path, {"query": QUERY, "texts": DOCUMENTS, "return_text": True})
    assert [rank["text"] for rank in shown] == [DOCUMENTS[index] for index in ORDER]


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({}, 1.0),
        ({"truncate": False}, 1.0),
        ({"truncate": True}, 0.0),
        ({"truncate": True, "truncation_direction": "Right"}, 0.0),
        ({"truncate": True, "truncation_direction": "Left"}, 1.0),
    ],
    ids=str,
)
async def test_teis_truncation(client, options, score):
    """Cut on the right only the beginning is read, as in TEI; otherwise all of it, in windows."""
    ranks = await post(client, "/tei/rerank", {"query": QUERY, "texts": [LONG], **options})
    assert ranks[0]["score"] == score


async def test_tei_refuses_to_cut_a_query_that_may_not_be(client):
    """With `truncate` false a query over half of what the model reads is TEI's Validation error."""
    body = {"query": LONG_QUERY, "texts": ["red"]}
    assert len(await post(client, "/tei/rerank", body)) == 1
    response = await client.post("/tei/rerank", json={**body, "truncate": False})
    assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
    assert "query" in response.json()["error"]


async def test_teis_info_and_health(client):
    """Every key of TEI's `/info`, the model's type with its labels; health is empty."""
    info = (await client.get("/tei/info")).json()
    assert (info["model_id"], info["model_sha"], info["model_dtype"]) == ("words", None, "float32")
    assert info["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    assert (info["max_input_length"], info["max_client_batch_size"], info["auto_truncate"]) == (12, 1000, True)
    assert {"max_concurrent_requests", "max_batch_tokens", "max_batch_requests", "tokenization_workers"} <= set(info)
    for path in ("/tei/health", "/tei", "/tei/", "/tei/ping"):
        response = await client.get(path)
        assert (response.status_code, response.content) == (200, b"")


async def test_a_classifiers_labels():
    """One input is answered with an array, a list of inputs with one array each; all labels, best first, adding up to 1."""
    async with serving(app_of(WordBackend(labels=("yes", "no", "perhaps")))) as client:
        for inputs in ("red green", ["red green"], ["red", "a red one"]):
            labels = await post(client, "/tei/predict", {"inputs": inputs})
            assert [one["label"] for one in labels] == ["yes", "no", "perhaps"]
            assert sum(one["score"] for one in labels) == pytest.approx(1.0)
        batch = await post(client, "/tei/predict", {"inputs": [["red"], ["red", "blue"]], "raw_scores": True})
        assert [[one["score"] for one in labels] for labels in batch] == [[10.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        response = await client.post("/tei/predict", json={"inputs": [["red"], ["red", "blue"]]})
        assert (response.headers["x-compute-tokens"], response.headers["x-compute-characters"]) == ("9", "10")
        info = (await client.get("/tei/info")).json()
        assert info["model_type"]["classifier"]["id2label"] == {"0": "yes", "1": "no", "2": "perhaps"}
        assert (await client.get("/info")).json()["labels"] == ["yes", "no", "perhaps"]


async def test_each_kind_of_model_says_which_routes_are_for_it(client):
    """A reranker refuses to predict, and labels that say nothing about relevance do not rank."""
    refused = await client.post("/tei/predict", json={"inputs": "red"})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
    assert "classifier" in refused.json()["error"]
    async with serving(app_of(WordBackend(labels=("yes", "no", "perhaps")))) as classifier:
        for path, body in (
            ("/rerank", {"query": QUERY, "documents": DOCUMENTS}),
            ("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS}),
            ("/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
            ("/tei/rerank", {"query": QUERY, "texts": DOCUMENTS}),
        ):
            response = await classifier.post(path, json=body)
            assert response.status_code == 422
            assert "/tei/predict" in response.text
