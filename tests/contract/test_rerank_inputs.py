"""What the rerank routes make of bad input and of input at the limits: a documented answer, or an error that names the item."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import orjson
import pytest

from tests.contract.rerank_words import WordBackend, app_of
from tests.integration.conftest import JSON, UNREADABLE, serving

QUERY = "red green"
MAX_DOCUMENT_CHARS = 8_000_000

Body = Callable[[str, Any], dict[str, Any]]
# How each route is sent a query and documents, and the name that it has for these.
ROUTES: dict[str, tuple[Body, str, str]] = {
    "/rerank": (lambda query, documents: {"query": query, "documents": documents}, "query", "documents"),
    "/v1/rerank": (lambda query, documents: {"query": query, "documents": documents}, "query", "documents"),
    "/v2/rerank": (lambda query, documents: {"query": query, "documents": documents}, "query", "documents"),
    "/score": (lambda query, documents: {"text_1": query, "text_2": documents}, "text_1", "text_2"),
    "/v1/score": (lambda query, documents: {"queries": query, "documents": documents}, "queries", "documents"),
    "/tei/rerank": (lambda query, documents: {"query": query, "texts": documents}, "query", "texts"),
}
every_route = pytest.mark.parametrize("path", list(ROUTES))


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service with the words scorer."""
    async with serving(app_of(WordBackend())) as client:
        yield client


async def send(client: httpx2.AsyncClient, path: str, body: Any) -> httpx2.Response:
    """Post *body*, JSON or bytes."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return await client.post(path, content=content, headers=JSON)


def fault_of(response: httpx2.Response) -> str:
    """Return the message of a refusal, which must be short and in the shape of its dialect."""
    body = response.json()
    assert len(response.content) < 2500
    if "error_type" in body:
        assert set(body) == {"error", "error_type"}
        return body["error"]
    assert body["error"]["message"].startswith(body["error"]["param"])
    return body["error"]["message"]


async def works(client: httpx2.AsyncClient, path: str, query: str, documents: list[Any]) -> list[Any]:
    """Return the results for a request that must be answered, all documents in it."""
    response = await send(client, path, ROUTES[path][0](query, documents))
    assert response.status_code == 200, response.text[:500]
    reply = response.json()
    results = reply if isinstance(reply, list) else reply.get("results") or reply["data"]
    assert sorted(result["index"] for result in results) == list(range(len(documents)))
    return results


# --- documents ----------------------------------------------------------------------------------------------------


@every_route
async def test_no_documents(client, path):
    """An empty list is refused by name: in TEI's dialect as Empty (400), elsewhere 422."""
    body, _, name = ROUTES[path]
    response = await send(client, path, body(QUERY, []))
    assert response.status_code == (400 if path.startswith("/tei") else 422)
    assert name in fault_of(response)


@every_route
async def test_a_thousand_documents_and_more(client, path):
    """1,000 are answered; 1,001 and 10,001 are 422, with the field, the number and the limit, and nothing is done."""
    body, _, name = ROUTES[path]
    assert len(await works(client, path, QUERY, ["red"] * 1000)) == 1000
    for count in (1001, 10_001):
        response = await send(client, path, body(QUERY, ["red"] * count))
        assert response.status_code == 422
        assert fault_of(response) == f"{name}: at most 1000 are allowed in one request, and there are {count}"


@every_route
@pytest.mark.parametrize(
    "document", ["", " ", "\n", "\u200b", "🙂", "[SEP]", "x" * 100_000], ids=lambda text: ascii(text)[:20]
)
async def test_any_text_is_a_document(client, path, document):
    """A document may be empty, or without a word: it has a score and its place."""
    assert len(await works(client, path, QUERY, ["red", document])) == 2


@every_route
async def test_a_document_of_five_megabytes(client, path):
    """It is read as far as windows go; over 8,000,000 characters the item is named. The small one beside it is scored."""
    body, _, name = ROUTES[path]
    results = await works(client, path, QUERY, ["red green", "red " + "word " * 1_000_000])
    scores = {result["index"]: result.get("score", result.get("relevance_score")) for result in results}
    assert scores == {0: 1.0, 1: 0.5}
    response = await send(client, path, body(QUERY, ["a", "x" * (MAX_DOCUMENT_CHARS + 1)]))
    assert response.status_code == 422
    assert f"{name}.1:" in fault_of(response)


@every_route
@pytest.mark.parametrize("document", [5, 1.5, True, None, ["red"], "a\0"], ids=ascii)
async def test_documents_that_are_no_texts(client, path, document):
    """The first such item is named, and the service goes on."""
    body, _, name = ROUTES[path]
    response = await send(client, path, body(QUERY, ["red", document, "green"]))
    assert response.status_code == 422
    assert f"{name}.1" in fault_of(response)
    await works(client, path, QUERY, ["red"])


@pytest.mark.parametrize("path", ["/score", "/tei/rerank"])
async def test_objects_where_only_texts_are_taken(client, path):
    """vLLM's scores and TEI know no objects with a text: the item is named."""
    body, _, name = ROUTES[path]
    response = await send(client, path, body(QUERY, ["red", {"text": "green"}]))
    assert response.status_code == 422
    assert f"{name}.1" in fault_of(response)


@pytest.mark.parametrize("path", list(ROUTES))
@pytest.mark.parametrize("documents", [None, 5, {"text": "red"}], ids=ascii)
async def test_documents_that_are_no_list(client, path, documents):
    """The field is named. A single string is a list of one for `/score`, and for nobody else."""
    body, _, name = ROUTES[path]
    response = await send(client, path, body(QUERY, documents))
    assert response.status_code == 422
    assert name in fault_of(response)
    single = await send(client, path, body(QUERY, "red"))
    assert single.status_code == (200 if path.endswith("score") else 422)


# --- objects ------------------------------------------------------------------------------------------------------

COHERE = ["/v1/rerank", "/v2/rerank"]
OBJECT_FAULTS = [
    ("no text", {"documents": ["red", {"title": "a"}]}, "documents.1.text"),
    ("no text, an empty object", {"documents": [{}]}, "documents.0.text"),
    ("a text that is null", {"documents": [{"text": None}]}, "documents.0.text"),
    ("a text that is a number", {"documents": ["red", {"text": 5}]}, "documents.1.text"),
    ("without the rank field", {"documents": [{"t": "a"}, {"u": "b"}], "rank_fields": ["t"]}, "documents.1.t"),
    (
        "without one of the rank fields",
        {"documents": ["red", {"t": "a", "u": "b"}, {"t": "c"}], "rank_fields": ["t", "u"]},
        "documents.2.u",
    ),
    ("a rank field that is a list", {"documents": [{"t": ["a"]}], "rank_fields": ["t"]}, "documents.0.t"),
    ("a null byte in the text", {"documents": [{"text": "a\0"}]}, "documents.0.text"),
    ("a null byte in another field", {"documents": [{"text": "a", "t": "\0"}]}, "documents.0.t"),
    ("a text over the limit", {"documents": [{"text": "x" * (MAX_DOCUMENT_CHARS + 1)}]}, "documents.0.text"),
    ("a field of any length", {"documents": [{}], "rank_fields": ["x" * 10_000]}, "documents.0." + "x" * 188),
    ("no rank fields", {"documents": ["a"], "rank_fields": []}, "rank_fields"),
    ("a rank field that is no text", {"documents": ["a"], "rank_fields": [5]}, "rank_fields.0"),
]


@pytest.mark.parametrize("path", COHERE)
@pytest.mark.parametrize(("fields", "param"), [row[1:] for row in OBJECT_FAULTS], ids=[row[0] for row in OBJECT_FAULTS])
async def test_objects_without_what_they_are_ranked_by(client, path, fields, param):
    """Strings and objects may be mixed; an object that lacks the field, or has no text in it, is named with the field."""
    response = await send(client, path, {"query": QUERY, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert response.json()["message"].startswith(param)


async def test_an_object_nested_without_end(client):
    """Fields of any depth that JSON's parser takes come back, or are refused: never a failure of ours."""
    for depth in (10, 100, 250, 500, 900, 5000):
        nested = b"[" * depth + b"]" * depth
        body = b'{"query": "red", "return_documents": true, "documents": [{"text": "red", "more": ' + nested + b"}]}"
        response = await send(client, "/v1/rerank", body)
        assert response.status_code in (200, 400, 422), (depth, response.text)
        if depth <= 100:
            assert orjson.dumps(response.json()["results"][0]["document"]["more"]) == nested


# --- options ------------------------------------------------------------------------------------------------------

OPTION_FAULTS = [
    ("/rerank", {"top_n": 0}, "top_n"),
    ("/rerank", {"top_n": -1}, "top_n"),
    ("/rerank", {"top_n": 1.5}, "top_n"),
    ("/rerank", {"long_documents": "all"}, "long_documents"),
    ("/rerank", {"max_document_tokens": 0}, "max_document_tokens"),
    ("/rerank", {"priors": [1.0, 2.0, 3.0, 4.0, 5.0]}, "priors"),
    ("/rerank", {"priors": ["high"]}, "priors.0"),
    ("/rerank", {"rank_fields": ["a"]}, "rank_fields"),
    ("/rerank", {"texts": ["a"]}, "texts"),
    ("/v1/rerank", {"top_n": -1}, "top_n"),
    ("/v1/rerank", {"top_n": "2"}, "top_n"),
    ("/v1/rerank", {"return_documents": "yes"}, "return_documents"),
    ("/v1/rerank", {"max_chunks_per_doc": 0}, "max_chunks_per_doc"),
    ("/v1/rerank", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ("/v1/rerank", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/rerank", {"use_activation": "no"}, "use_activation"),
    ("/v2/rerank", {"top_n": -1}, "top_n"),
    ("/v2/rerank", {"max_tokens_per_doc": -1}, "max_tokens_per_doc"),
    ("/v2/rerank", {"priority": "high"}, "priority"),
    ("/v2/rerank", {"relevant_spans": {"mode": "maybe"}}, "relevant_spans.mode"),
    ("/v2/rerank", {"relevant_spans": {"mode": "enabled", "threshold": 2}}, "relevant_spans.threshold"),
    ("/score", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ("/tei/rerank", {"truncate": "yes"}, "truncate"),
    ("/tei/rerank", {"truncation_direction": "up"}, "truncation_direction"),
    ("/tei/rerank", {"raw_scores": 1}, "raw_scores"),
]


@pytest.mark.parametrize(("path", "options", "param"), OPTION_FAULTS, ids=str)
async def test_options_out_of_range(client, path, options, param):
    """Each is refused by name; `top_n` of 0 is everything to vLLM's clients and an error natively."""
    response = await send(client, path, {**ROUTES[path][0](QUERY, ["red", "green"]), **options})
    assert response.status_code == 422
    assert fault_of(response).startswith(param)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_top_n_over_the_count(client, path):
    """Everything is returned."""
    response = await send(client, path, {**ROUTES[path][0](QUERY, ["red", "green"]), "top_n": 3})
    assert len(response.json()["results"]) == 2


# --- queries ------------------------------------------------------------------------------------------------------


@every_route
async def test_a_query_of_ten_thousand_tokens(client, path):
    """Up to 32,768 characters its beginning is used; above that it is refused by name."""
    body, name, _ = ROUTES[path]
    await works(client, path, "a " * 10_000, ["red", "green"])
    response = await send(client, path, body("word " * 10_000, ["red"]))
    assert response.status_code == 422
    assert fault_of(response).startswith(f"{name}:")


@every_route
@pytest.mark.parametrize("query", ["", " \n", "a\0", None, 5, ["a", 5]], ids=ascii)
async def test_queries_that_are_none(client, path, query):
    """An empty or blank query, or one that is no text, is named."""
    body, name, _ = ROUTES[path]
    response = await send(client, path, body(query, ["red", "green"]))
    assert response.status_code == 422
    assert fault_of(response).startswith(name)


@pytest.mark.parametrize(
    ("queries", "documents"), [(["a", "b"], ["a"]), (["a", "b"], "a"), (["a"] * 3, ["a"] * 2)], ids=ascii
)
async def test_queries_and_documents_of_other_numbers(client, queries, documents):
    """Scores are of one query with each document, or of pairs: what is neither is refused with both numbers."""
    response = await send(client, "/score", {"text_1": queries, "text_2": documents})
    assert response.status_code == 422
    assert str(len(queries)) in fault_of(response)


@every_route
async def test_missing_fields(client, path):
    """A request without a query or documents is told which; one without either, one of them."""
    body, query, documents = ROUTES[path]
    whole = body(QUERY, ["red"])
    for lacking in (query, documents):
        response = await send(client, path, {name: value for name, value in whole.items() if name != lacking})
        assert response.status_code == 422
        # Of a field with several names it is the first that is told.
        assert fault_of(response).split(":")[0] in (query, documents, "queries", "documents")


@every_route
@pytest.mark.parametrize("body", [row[1] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
async def test_unreadable_bodies(client, path, body):
    """What is no JSON object in UTF-8 is 400 (422 in TEI's dialect), and the service goes on."""
    response = await send(client, path, body)
    assert response.status_code == (422 if path.startswith("/tei") else 400)
    await works(client, path, QUERY, ["red"])


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "status", "part"),
    [
        ([], 400, "inputs"),
        ("", 400, "inputs"),
        ([""], 400, "inputs"),
        (["", ""], 400, "inputs"),
        ([["red"], [""]], 400, "inputs.1"),
        ([[]], 422, "inputs.0"),
        ([["a", "b", "c"]], 422, "inputs.0"),
        (["a", "b", "c"], 422, "inputs"),
        ([["a"], "b"], 422, "inputs.1"),
        (["a", ["b"]], 422, "inputs.1"),
        ([["a"], ["b", 5]], 422, "inputs.1.1"),
        ([["a\0"]], 422, "inputs.0.0"),
        ([["a"]] * 1001, 422, "at most 1000"),
        (5, 422, "inputs"),
        (None, 422, "inputs"),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_inputs_that_cannot_be_predicted(inputs, status, part):
    """Empty inputs are TEI's Empty (400), wrong shapes its Validation (422); the item is named."""
    async with serving(app_of(WordBackend(labels=("yes", "no", "perhaps")))) as client:
        response = await send(client, "/tei/predict", {"inputs": inputs})
        assert response.status_code == status, response.text
        assert part in fault_of(response)


async def test_bad_requests_leave_good_ones_alone(client):
    """Among many at once, only those concerned are refused."""
    good = [works(client, path, QUERY, ["red", "green"]) for path in ROUTES for _ in range(5)]
    bad = [send(client, path, ROUTES[path][0](QUERY, ["red", 5])) for path in ROUTES for _ in range(5)]
    answers = await asyncio.gather(*good, *bad)
    assert all(answer.status_code == 422 for answer in answers[len(good) :])
