"""The search routes over ports that are dictionaries: options as JSON, their refusals, and batches."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields

import httpx2
import pytest
import pytest_asyncio

from services.common.app import create_service_app
from services.common.errors import Overloaded
from services.common.metrics import Metrics
from services.search.batches import Batches
from services.search.resources import SearchResources
from services.search.routes.search import router
from services.search.settings import SearchSettings
from tests.integration.conftest import Refused, Serve
from tests.search_ports import Stack, make_stack


@pytest.fixture
def stack() -> Stack:
    """A pipeline where all is well."""
    return make_stack()


@pytest_asyncio.fixture
async def client(serve: Serve, stack: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an app that has the search routes, and of the resources those that they use."""

    @asynccontextmanager
    async def build(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[SearchResources]:
        parts = {field.name: None for field in fields(SearchResources)}
        batches = Batches(stack.catalog, stack.embedding, stack.pipeline)
        yield SearchResources(**{**parts, "pipeline": stack.pipeline, "batches": batches})

    app = create_service_app(
        "search", SearchSettings(), build, [router], description="Search alone.", needs=lambda method, path: "search"
    )
    async with serve(app) as client:
        yield client


async def test_every_option_at_once(client: httpx2.AsyncClient, stack: Stack):
    """A search with all options is answered, and what was not asked for is not in the reply."""
    body = {
        "query": "why",
        "query_vector": [1, 0],
        "lexical": {"match": "all", "prefix": True, "stop_words": False},
        "exact": True,
        "min_score": {"kind": "rerank", "value": 0},
        "group_by": "n",
        "diversity": 1,
        "facets": {"n": 5},
        "include": ["text", "highlights"],
        "highlights_max_chars": 100,
        "explain": True,
    }
    reply = await client.post("/search", json=body)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert [hit["id"] for hit in found["hits"]] == ["d"]
    assert (found["hits"][0]["highlights"], found["facets"]) == ([], {"n": {}})
    assert found["explain"]["candidates"]["total"] == 4
    plain = (await client.post("/search", json={"query": "why"})).json()
    assert not {"explain", "facets"} & plain.keys()
    assert "highlights" not in plain["hits"][0]
    assert (await client.get("/search", params={"q": "why"})).json()["hits"] == plain["hits"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lexical": {"match": "most"}}, "lexical.match"),
        ({"lexical": {"fuzzy": True}}, "lexical.fuzzy"),
        ({"min_score": {"kind": "cosine", "value": 1}}, "min_score.kind"),
        ({"min_score": {"kind": "dense", "value": "high"}}, "min_score.value"),
        ({"min_score": {"kind": "rerank", "value": 0.5}, "rerank": False}, "min_score.kind"),
        ({"group_by": ""}, "group_by"),
        ({"diversity": 1.1}, "diversity"),
        ({"facets": {"n": 0}}, "facets.n"),
        ({"include": ["marks"]}, "include"),
        ({"highlights_max_chars": 5}, "highlights_max_chars"),
        ({"offset": 10_000}, "offset"),
        ({"exact": 1}, "exact"),
        ({"filter": {"n": {"$near": 1}}}, "filter.n.$near"),
        ({"query_vector": [1, 2, 3]}, "query_vector"),
    ],
    ids=str,
)
async def test_a_wrong_option_is_named(refused: Refused, fields, param):
    """Each is 422 and says which field."""
    status, error = await refused("/search", {"query": "why", **fields})
    assert (status, error["code"]) == (422, "invalid_input")
    assert error["param"].startswith(param)


async def test_a_batch_answers_each_by_itself(client: httpx2.AsyncClient, stack: Stack):
    """Results come in the order of the searches: answers as if asked alone, and an error where one fails."""
    searches = [
        {"query": "why", "cache": False, "k": 1},
        {"query": "why", "collection": "films"},
        {"query": "why", "cache": False, "filter": {"n": {"$near": 1}}},
        *[{"query": f"why {n}"} for n in range(20)],
    ]
    reply = await client.post("/search/batch", json={"searches": searches}, headers={"x-request-id": "abc-1"})
    assert reply.status_code == 200, reply.text
    first, second, third, *others = reply.json()["results"]
    assert [hit["id"] for hit in first["answer"]["hits"]] == ["d"]
    assert first["answer"]["request_id"] == "abc-1"
    assert (second["error"]["code"], second["error"]["param"]) == ("not_found", "collection")
    assert (third["error"]["code"], third["error"]["retryable"]) == ("invalid_input", False)
    assert "answer" not in second
    assert all("error" not in one and len(one["answer"]["hits"]) == 4 for one in others)


async def test_a_batch_bounds_what_runs_at_once(client: httpx2.AsyncClient, stack: Stack):
    """However many searches there are, eight are under way at a time."""
    running = most = 0
    plain = stack.retriever.retrieve

    async def counted(*asked):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)
        try:
            return await plain(*asked)
        finally:
            running -= 1

    stack.retriever.retrieve = counted
    searches = [{"query": f"why {n}", "cache": False} for n in range(100)]
    reply = await client.post("/search/batch", json={"searches": searches})
    assert len(reply.json()["results"]) == 100
    assert most == 8


async def test_a_failing_part_degrades_each_answer(client: httpx2.AsyncClient, stack: Stack):
    """A batch steps down as single searches do."""
    stack.embedding.error = Overloaded("full")
    reply = await client.post("/search/batch", json={"searches": [{"query": "why"}] * 2})
    assert [one["answer"]["degraded"] for one in reply.json()["results"]] == [["embedding_unavailable"]] * 2


@pytest.mark.parametrize(
    ("searches", "status", "param"),
    [
        ([], 422, "searches"),
        ([{"query": "why"}] * 101, 413, "searches"),
        ([{"query": "why"}, {"query": "why", "k": 0}], 422, "searches.1.k"),
        ([{"query": "why"}, {"mode": "dense"}], 422, "searches.1.query"),
        ([{"query": "why", "mode": "dense", "lexical": {}}], 422, "searches.0.lexical"),
        ("why", 422, "searches"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_malformed_batch_is_refused_as_a_whole(refused: Refused, stack: Stack, searches, status, param):
    """The search at fault is named by its number, and none has run."""
    found, error = await refused("/search/batch", {"searches": searches})
    assert (found, error["param"]) == (status, param)
    assert stack.retriever.queries == []
