"""The search service in this process, its peers out of reach: many searches at once, its status, and what it watches."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from services.common.wire.documents import NDJSON
from services.common.wire.msearch import SearchLine
from services.common.wire.search import BatchReply
from services.common.wire.status import StatusReply
from services.search.app import create_app
from services.search.settings import SearchSettings
from tercet.client import TercetClient
from tercet.errors import TercetApiError
from tests.integration.conftest import serving

DIM = 8
NOBODY = "http://127.0.0.1:9"
WORDS = ("tide", "bread", "bee", "rook")


def documents() -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    return [
        {
            "id": str(n),
            "text": f"{WORDS[n % 4]} number {n}",
            "metadata": {"n": n},
            "vector": rng.normal(size=DIM).tolist(),
        }
        for n in range(200)
    ]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """What the service of a test is told; tests change it."""
    return {"data_dir": tmp_path, "embedding_url": NOBODY, "rerank_url": NOBODY, "default_collection": "points"}


@pytest.fixture
def told() -> dict[str, Any]:
    """The settings that a test's parameters may replace."""
    return {}


@pytest_asyncio.fixture
async def client(settings: dict[str, Any], told: dict[str, Any]) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with 200 documents that brought vectors."""
    async with serving(create_app(SearchSettings(**{**settings, **told}))) as client:
        made = await client.post("/collections", json={"name": "points", "dim": DIM, "shards": 2})
        assert made.status_code == 201, made.text
        written = await client.post("/collections/points/documents", json={"documents": documents()})
        assert written.json()["applied"], written.text
        yield client


def lines(reply: httpx2.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith(NDJSON)
    return [orjson.loads(line) for line in reply.content.splitlines()]


def body(*searches: dict[str, Any] | str) -> bytes:
    return b"".join((one.encode() if isinstance(one, str) else orjson.dumps(one)) + b"\n" for one in searches)


def lexical(query: str, **fields: Any) -> dict[str, Any]:
    return {"query": query, "mode": "lexical", "rerank": False, **fields}


async def series(client: httpx2.AsyncClient) -> dict[str, float]:
    """Return what `/metrics` says, by name and labels."""
    text = (await client.get("/metrics")).text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


# --- lists


async def test_a_batch_answers_each_by_itself(client: httpx2.AsyncClient):
    """In order: answers whose bodies are those of single searches, and errors in the usual shape."""
    searches = [lexical("tide"), lexical("bread", collection="none"), lexical("bee", k=2), lexical("tide")]
    reply = await client.post("/search/batch", json={"searches": searches}, headers={"x-request-id": "b-1"})
    results = BatchReply.model_validate(reply.json()).results
    assert [one.error is None for one in results] == [True, False, True, True]
    assert all("tide" in str(hit.text) for hit in results[0].answer.hits)
    assert len(results[2].answer.hits) == 2
    assert (results[1].error.code, results[1].error.request_id) == ("not_found", "b-1")
    assert reply.json()["results"][0] == reply.json()["results"][3]
    alone = (await client.post("/search", json={**lexical("bee", k=2), "cache": False})).json()
    assert [hit.id for hit in results[2].answer.hits] == [hit["id"] for hit in alone["hits"]]


async def test_the_client_asks_many_at_once(client: httpx2.AsyncClient):
    """`search_batch` gives each answer or error in its place; one malformed search is an error for all, by its number."""
    searches = [lexical("tide", k=3, min_score=None), lexical("bread", collection="none")]
    async with TercetClient("http://service", transport=client._transport) as tercet:
        results = (await tercet.search_batch(searches)).results
        assert (len(results[0].answer.hits), results[1].error.code) == (3, "not_found")
        with pytest.raises(TercetApiError) as refused:
            await tercet.search_batch([*searches, lexical("bee", k=0)])
    assert (refused.value.status, refused.value.param) == (422, "searches.2.k")


async def test_a_batch_steps_down_as_one_search_would(client: httpx2.AsyncClient):
    """Without the embedding and rerank services each search says so itself."""
    made = await client.post("/collections", json={"name": "modelled", "dim": DIM})
    assert made.status_code == 201
    reply = await client.post("/search/batch", json={"searches": [{"query": "tide", "query_vector": [1.0] * DIM}] * 2})
    for one in BatchReply.model_validate(reply.json()).results:
        assert one.answer.degraded == ["rerank_unavailable"]


# --- lines


async def test_lines_are_answered_in_their_order(client: httpx2.AsyncClient):
    """One line out for each in, with its number; blank lines are passed over; more of them than are taken together."""
    asked = [lexical(WORDS[n % 4], k=1 + n % 3) for n in range(150)]
    reply = await client.post("/msearch", content=body(*asked[:70], "", "  ", *asked[70:]))
    found = [SearchLine.model_validate(line) for line in lines(reply)]
    assert [line.index for line in found] == list(range(150))
    for search, line in zip(asked, found, strict=True):
        assert len(line.answer.hits) == search["k"]
        assert all(search["query"] in str(hit.text) for hit in line.answer.hits)


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ('{"query": ', "malformed_request", None),
        ('["tide"]', "malformed_request", None),
        ('{"query": "tide", "k": 0}', "invalid_input", "k"),
        ('{"query": "tide", "kk": 1}', "invalid_input", "kk"),
        ('{"query": "tide", "offset": 99999}', "invalid_input", "offset"),
        ('{"mode": "dense"}', "invalid_input", "query"),
        ('{"query": "tide", "collection": "none"}', "not_found", "collection"),
    ],
)
async def test_a_bad_line_is_an_error_of_its_own(client: httpx2.AsyncClient, line: str, code: str, param: str | None):
    """The lines before and after it are answered; the error names the field as a single search's would."""
    before, bad, after = lines(await client.post("/msearch", content=body(lexical("bee"), line, lexical("rook"))))
    assert (before["answer"]["hits"][0]["text"][:3], after["answer"]["hits"][0]["text"][:4]) == ("bee", "rook")
    assert (bad["index"], bad["error"]["code"], bad["error"].get("param")) == (1, code, param)


async def test_no_lines_are_no_answers(client: httpx2.AsyncClient):
    """An empty body is an empty reply."""
    assert lines(await client.post("/msearch", content=b"\n\n")) == []


async def test_searches_wait_for_who_reads_their_answers(settings: dict[str, Any]):
    """The first line is sent when 64 searches are done, and no others are begun while nobody takes it."""
    app = create_app(SearchSettings(**settings))
    sent = asyncio.Event()
    taken = asyncio.Event()
    received: list[bytes] = []
    unread = [body(*[lexical(f"tide {n}") for n in range(200)])]

    async def receive() -> dict[str, Any]:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            received.append(message["body"])
            sent.set()
            await taken.wait()

    def answered() -> float | None:
        return app.state.service.metrics.registry.get_sample_value("tercet_search_answers_total", {"outcome": "whole"})

    async with serving(app) as client:
        await client.post("/collections", json={"name": "points", "dim": DIM})
        path = {"path": "/msearch", "raw_path": b"/msearch", "query_string": b"", "root_path": ""}
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "POST", **path, "headers": [], "scheme": "http"}
        running = asyncio.create_task(app(scope, receive, send))
        await sent.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert (len(received), answered()) == (1, 64)
        taken.set()
        await running
        assert answered() == 200
    assert [orjson.loads(line)["index"] for line in b"".join(received).splitlines()] == list(range(200))


async def test_the_caller_says_how_urgent_it_is(client: httpx2.AsyncClient):
    """A word that X-Priority does not know is refused, by every way to search."""
    for method, path, sent in (
        ("POST", "/search", {"json": lexical("tide")}),
        ("POST", "/search/batch", {"json": {"searches": [lexical("tide")]}}),
        ("POST", "/msearch", {"content": body(lexical("tide"))}),
        ("GET", "/search?q=tide&mode=lexical&rerank=false", {}),
    ):
        assert (await client.request(method, path, headers={"x-priority": "high"}, **sent)).status_code == 200
        refused = await client.request(method, path, headers={"x-priority": "now"}, **sent)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "x-priority")


async def test_the_ways_to_search_are_documented(client: httpx2.AsyncClient):
    """OpenAPI names the reply of each, the two headers, and that lines are NDJSON."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path, method in (("/search", "post"), ("/search", "get"), ("/search/batch", "post"), ("/msearch", "post")):
        named = [one["name"] for one in paths[path][method]["parameters"]]
        assert {"X-Priority", "X-Deadline-Ms"} <= set(named)
        assert len(named) == len(set(named))
    assert NDJSON in paths["/msearch"]["post"]["requestBody"]["content"]
    assert list(paths["/msearch"]["post"]["responses"]["200"]["content"]) == [NDJSON]
    assert paths["/search"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/SearchReply"
    )


# --- how it stands


async def test_status_shows_breakers_load_and_cache(client: httpx2.AsyncClient):
    """The breaker of a service that is away is open, with when it opened; admission and cache layers show."""
    for n in range(8):
        await client.post("/search", json={"query": f"tide {n}", "query_vector": [1.0] * DIM})
    status = StatusReply.model_validate((await client.get("/status")).json())
    rerank = status.breakers["rerank"]
    assert rerank.state == "open"
    assert rerank.opened_s_ago is not None
    assert rerank.calls >= rerank.failures >= 1
    assert (status.breakers["embedding"].state, status.breakers["embedding"].opened_s_ago) == ("closed", None)
    assert status.dependencies["rerank"] == {"state": "open", "url": NOBODY}
    assert status.admission is not None
    assert (status.admission.in_flight, status.admission.waiting, status.admission.pressure) == (0, 0, 0)
    assert status.admission.limit > 1
    assert status.cache["kind"] == "memory"
    assert set(status.cache["layers"]) == {"memory"}
    assert (await client.get("/metrics")).text.count('tercet_breaker_state{dependency="rerank"} 2.0') == 1


async def test_readiness_depends_on_no_peer(client: httpx2.AsyncClient):
    """With embedding and rerank out of reach and their breakers open, requests are to be sent here still."""
    for n in range(5):
        await client.post("/search", json={"query": f"tide {n}", "query_vector": [1.0] * DIM})
    assert (await client.get("/readyz")).status_code == 200
    assert (await client.get("/livez")).status_code == 200


async def test_ready_with_a_redis_that_is_not_there(settings: dict[str, Any]):
    """Redis is a peer too."""
    async with serving(create_app(SearchSettings(**settings, redis_url="redis://127.0.0.1:9/0"))) as client:
        assert (await client.get("/readyz")).status_code == 200
        status = (await client.get("/status")).json()
        assert (status["cache"]["kind"], "redis" in status["cache"]["layers"]) == ("redis", True)


# --- what it watches


@pytest.mark.parametrize("told", [{"recall_sample_ratio": 1.0}])
async def test_recall_of_live_questions_is_measured(client: httpx2.AsyncClient):
    """A drawn question is asked again exactly; a flat index finds all there is, so its recall is 1."""
    rng = np.random.default_rng(3)
    async with asyncio.timeout(10):
        while not (said := await series(client))["tercet_retrieval_recall_at_10_count"]:
            vector = rng.normal(size=DIM).tolist()
            await client.post("/search", json={"query_vector": vector, "mode": "dense", "rerank": False})
    assert said["tercet_retrieval_recall_at_10_sum"] == said["tercet_retrieval_recall_at_10_count"]
    assert said['tercet_retrieval_recall_samples_total{outcome="measured"}'] >= 1


@pytest.mark.parametrize("told", [{"recall_sample_ratio": 0.0}])
async def test_degraded_answers_are_counted(client: httpx2.AsyncClient):
    """By outcome and reason, each search once; what the cache answers is not counted; stages have their times."""
    await client.post("/search", json={"query": "tide", "query_vector": [1.0] * DIM})
    for _ in range(2):
        await client.post("/search", json=lexical("bread"))
    said = await series(client)
    assert said['tercet_search_answers_total{outcome="degraded"}'] == 1
    assert said['tercet_search_answers_total{outcome="whole"}'] == 1
    assert said['tercet_search_degraded_total{reason="rerank_unavailable"}'] == 1
    assert said['tercet_search_degraded_total{reason="stale"}'] == 0
    assert said['tercet_search_stage_seconds_count{stage="retrieve"}'] == 2
    assert said["tercet_retrieval_recall_at_10_count"] == 0


@pytest.mark.parametrize("told", [{"slow_search_s": 1e-9}])
async def test_a_slow_search_is_logged_with_its_plan(client: httpx2.AsyncClient):
    """The line names each shard's plan, though the caller asked for no explanation, and no words."""
    asked = {"query": "tide secretword", "query_vector": [1.0] * DIM, "rerank": False, "filter": {"n": {"$lt": 150}}}
    with capture_logs() as logs:
        reply = (await client.post("/search", json=asked, headers={"x-request-id": "slow-1"})).json()
    assert "explain" not in reply
    [line] = [line for line in logs if line["event"] == "slow_search"]
    assert line["request_id"] == "slow-1"
    assert [one["shard"] for one in line["shards"]] == [0, 1]
    for one in line["shards"]:
        assert {"filter", "vectors", "lexical"} <= one["plan"].keys()
        assert one["took_ms"] > 0
    assert line["asked"]["filter"] == {"n": {"$lt": "?"}}
    assert "secretword" not in str(line)
    assert {"retrieve", "total"} <= line["timings_ms"].keys()
