"""The search API over real sockets, with the fake model: what it answers, and how it refuses bad input."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from services.common.wire.errors import ErrorEnvelope
from tests.e2e.stack import DOCUMENTS, running

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a stack that holds DOCUMENTS in the collection `facts`."""
    settings = {"EMBEDDING_MODEL": "fake", "RERANK_MODEL": "fake", "SEARCH_DEFAULT_SHARDS": "2"}
    async with running(tmp_path_factory.mktemp("stack"), **settings) as (stack, client):
        await client.write("facts", DOCUMENTS)
        async with httpx2.AsyncClient(base_url=stack.url, timeout=30, trust_env=False) as http:
            yield http


async def search(http: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post("/search", json={"collection": "facts", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_every_mode_finds_the_document(http: httpx2.AsyncClient):
    """Each mode and fusion answers, and names what it ran."""
    for mode, kind in (("hybrid", "fused"), ("dense", "dense"), ("lexical", "bm25")):
        reply = await search(http, query="flour water salt yeast dough", mode=mode, rerank=False)
        assert reply["hits"][0]["id"] == "bread"
        assert reply["hits"][0]["score_kind"] == kind
        assert reply["pipeline"] == {"retrieval": mode}
    reply = await search(http, query="flour water salt yeast dough", fusion="rrf")
    assert (reply["hits"][0]["id"], reply["hits"][0]["score_kind"], reply["pipeline"]["rerank"]) == (
        "bread",
        "blended",
        "fake",
    )


async def test_reply_says_what_it_is_worth(http: httpx2.AsyncClient):
    """Coverage, as_of, timings and the request id are in every reply; the id is the caller's if it sent one."""
    reply = await http.post(
        "/search", json={"collection": "facts", "query": "moon tides"}, headers={"x-request-id": "abc-1"}
    )
    body = reply.json()
    assert body["coverage"]["shards"]["ok"] == body["coverage"]["shards"]["total"] == 2
    assert body["coverage"]["ratio"] == 1.0
    assert body["as_of"] >= len(DOCUMENTS)
    assert {"embed", "retrieve", "rerank", "total"} <= body["timings_ms"].keys()
    assert body["request_id"] == reply.headers["x-request-id"] == "abc-1"
    assert body["degraded"] == []


async def test_pages_do_not_overlap(http: httpx2.AsyncClient):
    """offset and k cut one order into pages."""
    whole = [hit["id"] for hit in (await search(http, query="the a", k=10, mode="dense"))["hits"]]
    pages = [
        hit["id"] for o in (0, 4, 8) for hit in (await search(http, query="the a", k=4, offset=o, mode="dense"))["hits"]
    ]
    assert pages == whole
    assert len(set(whole)) == len(DOCUMENTS)


async def test_filters(http: httpx2.AsyncClient):
    """A filter keeps what matches, an empty one keeps all, one without a match gives no hits and no error."""
    assert {
        hit["metadata"]["rank"] for hit in (await search(http, query="x", filter={"rank": {"$lt": 3}}))["hits"]
    } == {0, 1, 2}
    assert len((await search(http, query="x", filter={}))["hits"]) == len(DOCUMENTS)
    assert (await search(http, query="bread", filter={"rank": 99}))["hits"] == []


async def test_include_chooses_the_fields(http: httpx2.AsyncClient):
    """`include` leaves text and metadata out, or brings the vector in."""
    hit = (await search(http, query="moon", k=1, include=["vector"]))["hits"][0]
    assert "text" not in hit
    assert "metadata" not in hit
    assert len(hit["vector"]) == 64


async def test_cache_serves_until_the_collection_moves(http: httpx2.AsyncClient):
    """The same search is a cache hit until a write; `cache: false` never is."""
    ask = {"collection": "moving", "query": "first words"}
    await http.post("/collections/moving/documents", json={"documents": [{"id": "1", "text": "first words"}]})
    assert not (await search(http, **ask))["cache"]["hit"]
    assert (await search(http, **ask))["cache"]["hit"]
    assert not (await search(http, **ask, cache=False))["cache"]["hit"]
    await http.post("/collections/moving/documents", json={"documents": [{"id": "2", "text": "second first words"}]})
    reply = await search(http, **ask)
    assert not reply["cache"]["hit"]
    assert {hit["id"] for hit in reply["hits"]} == {"1", "2"}


async def test_documents_come_back_change_and_go(http: httpx2.AsyncClient):
    """A document is read back to the letter, replaced by its id, and gone after its deletion; ids may hold slashes."""
    path = "/collections/crud/documents"
    document = {
        "id": "a/b c?",
        "title": "T",
        "text": "Ünïcödé 東京 \n tab\t",
        "metadata": {"n": 1, "f": 1.5, "t": True, "l": ["x", "y"]},
    }
    written = (await http.post(path, json={"documents": [document]})).json()
    assert (written["accepted"], written["unchanged"], written["embedded"], written["applied"]) == (1, 0, 1, True)
    assert (await http.get(f"{path}/a%2Fb%20c%3F")).json() == {**document, "seq": written["seq"]}
    again = (await http.post(path, json={"documents": [document]})).json()
    assert (again["unchanged"], again["embedded"], again["seq"]) == (1, 0, written["seq"])
    moved = (await http.post(path, json={"documents": [{**document, "metadata": {}}]})).json()
    assert (moved["unchanged"], moved["embedded"]) == (0, 0)
    assert (await http.delete(f"{path}/a%2Fb%20c%3F")).json()["deleted"] == 1
    assert (await http.delete(f"{path}/a%2Fb%20c%3F")).json()["deleted"] == 0
    assert (await http.get(f"{path}/a%2Fb%20c%3F")).status_code == 404
    assert (await search(http, collection="crud", query="東京"))["hits"] == []


async def test_collections_of_own_vectors(http: httpx2.AsyncClient):
    """With `dim`, documents bring vectors and no model is asked; a search brings one too, or is lexical."""
    assert (await http.post("/collections", json={"name": "own", "dim": 3, "shards": 1})).status_code == 201
    assert (await http.post("/collections", json={"name": "own", "dim": 3})).status_code == 409
    documents = [{"id": "x", "text": "east", "vector": [2, 0, 0]}, {"id": "y", "text": "north", "vector": [0, 5, 0]}]
    assert (await http.post("/collections/own/documents", json={"documents": documents})).json()["embedded"] == 0
    hits = (await search(http, collection="own", query_vector=[0.1, 0.9, 0], mode="dense"))["hits"]
    assert [hit["id"] for hit in hits] == ["y", "x"]
    assert hits[0]["score"] == pytest.approx(0.99388, abs=1e-4)
    assert [hit["id"] for hit in (await search(http, collection="own", query="east", mode="lexical"))["hits"]] == ["x"]
    refused = await http.post("/search", json={"collection": "own", "query": "east"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "query_vector")
    assert (await http.delete("/collections/own")).status_code == 204
    assert (await http.get("/collections/own")).status_code == 404


@pytest.mark.parametrize(
    "query", ['"', "*", "AND (", "title:", "~", "a OR", "[x TO y]", "\\", "-", "^2", "'; DROP TABLE", "{!x}"]
)
async def test_no_character_of_a_query_is_syntax(http: httpx2.AsyncClient, query: str):
    """Query-language characters are plain text in every mode."""
    for mode in ("hybrid", "dense", "lexical"):
        reply = await search(http, query=f"{query} yeast", mode=mode)
        assert reply["degraded"] == []
        assert "bread" in [hit["id"] for hit in reply["hits"]]
        await search(http, query=query, mode=mode)


DOC = {"id": "z", "text": "x"}
LIST = "/collections/facts/documents"
BAD = [
    ("/search", {"query": ""}, 422, "query"),
    ("/search", {"query": " \n"}, 422, "query"),
    ("/search", {}, 422, "query"),
    ("/search", {"query": 5}, 422, "query"),
    ("/search", {"query": "a\x00b"}, 422, "query"),
    ("/search", {"query": "a" * 40_000}, 422, "query"),
    ("/search", {"query": "a", "k": 0}, 422, "k"),
    ("/search", {"query": "a", "k": "3"}, 422, "k"),
    ("/search", {"query": "a", "kk": 3}, 422, "kk"),
    ("/search", {"query": "a", "mode": "best"}, 422, "mode"),
    ("/search", {"query": "a", "collection": "nowhere"}, 404, "collection"),
    ("/search", {"query": "a", "collection": "../x"}, 422, "collection"),
    ("/search", {"query": "a", "collection": "facts", "filter": {"$bad": 1}}, 422, "filter.$bad"),
    ("/search", {"query": "a", "collection": "facts", "min_seq": 10**9}, 422, "min_seq"),
    ("/search", {"query_vector": [1.0]}, 422, "query"),
    ("/search", {"query_vector": [1.0], "mode": "dense", "collection": "facts"}, 422, "query_vector"),
    ("/search", {"query_vector": [0.0] * 64, "mode": "dense", "collection": "facts"}, 422, "query_vector"),
    (LIST, {"documents": []}, 422, "documents"),
    (LIST, {"documents": [{"id": "i" * 1000, "text": "x"}]}, 422, "documents.0.id"),
    (LIST, {"documents": [{"id": "", "text": "x"}]}, 422, "documents.0.id"),
    (LIST, {"documents": [{"id": 5, "text": "x"}]}, 422, "documents.0.id"),
    (LIST, {"documents": [{"id": "z"}]}, 422, "documents.0.text"),
    (LIST, {"documents": [{"id": "z", "text": ""}]}, 422, "documents.0"),
    (LIST, {"documents": [{"id": "z", "text": "a\x00"}]}, 422, "documents.0.text"),
    (LIST, {"documents": [{"id": "z", "text": "a" * 1_000_001}]}, 422, "documents.0.text"),
    (LIST, {"documents": [{"id": "y", "text": "y", "metadata": {"a": {"b": 1}}}]}, 422, "documents.0.metadata.a"),
    (LIST, {"documents": [{"id": "y", "text": "y", "extra": 1}]}, 422, "documents.0.extra"),
    (LIST, {"documents": [{"id": "y", "text": "y", "vector": [1.0, 2.0]}]}, 422, "documents.0.vector"),
    (LIST, {"documents": [DOC] + [{"id": str(i), "text": "x"} for i in range(1000)]}, 413, "documents"),
    ("/collections", {"name": "a b"}, 422, "name"),
    ("/collections", {"name": "ok", "shards": 0}, 422, "shards"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
async def test_bad_input_is_named_and_nothing_is_written(
    http: httpx2.AsyncClient, path: str, body: Any, status: int, param: str
):
    """A bad field gets a 4xx that names it; the rest of its batch is not written either."""
    reply = await http.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = ErrorEnvelope.model_validate(reply.json()).error
    assert error.param == param
    assert error.request_id == reply.headers["x-request-id"]
    assert (await http.get(f"{LIST}/z")).status_code == 404


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"query": NaN}',
        b'{"query": "\xff"}',
        b'{"query": "\\ud800"}',
        b"[" * 100_000,
        b'{"k": 1e999}',
    ],
)
async def test_unreadable_bodies_are_refused(http: httpx2.AsyncClient, raw: bytes):
    """What is not JSON, not UTF-8, or nested without end is 400 or 422 in the envelope, and the service goes on."""
    for path in ("/search", LIST):
        reply = await http.post(path, content=raw, headers={"content-type": "application/json"})
        assert reply.status_code in (400, 422), reply.text
        ErrorEnvelope.model_validate(reply.json())
    assert (await search(http, query="yeast"))["hits"]


async def test_a_body_over_the_limit_is_413(http: httpx2.AsyncClient):
    """40 MB are refused by their stated length, and as they come when no length is stated."""
    raw = b" " * 40_000_000
    stated = await http.post("/search", content=raw, headers={"content-type": "application/json"})
    assert stated.status_code == 413

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), 1 << 20):
            yield raw[start : start + (1 << 20)]

    streamed = await http.post("/search", content=stream(), headers={"content-type": "application/json"})
    assert streamed.status_code == 413
    assert streamed.json()["error"]["code"] == "too_large"


async def test_ten_megabytes_of_documents_are_one_write(http: httpx2.AsyncClient):
    """Large but allowed: ten documents of a megabyte each go in together and are read back whole."""
    documents = [{"id": f"big{i}", "text": f"word{i} " * 140_000} for i in range(10)]
    written = await http.post("/collections/big/documents", json={"documents": documents})
    assert written.status_code == 200, written.text
    assert (await http.get("/collections/big/documents/big9")).json()["text"] == documents[9]["text"]


async def test_the_search_page_is_served(http: httpx2.AsyncClient):
    """`/` is a page that needs nothing from elsewhere, and may load nothing from elsewhere."""
    reply = await http.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text
    assert "https://" not in reply.text


async def test_status_and_health(http: httpx2.AsyncClient):
    """`/status`, `/livez`, `/readyz` and `/metrics` answer; series exist before they are used."""
    status = (await http.get("/status")).json()
    assert status["dependencies"]["embedding"]["state"] == "closed"
    assert {c["name"] for c in status["collections"]} >= {"facts"}
    assert (await http.get("/livez")).json()["status"] == "ok"
    assert (await http.get("/readyz")).json()["status"] == "ok"
    metrics = (await http.get("/metrics")).text
    assert 'tercet_breaker_state{dependency="embedding"} 0.0' in metrics
    assert 'route="/collections/{name}/documents"' in metrics
