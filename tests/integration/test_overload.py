"""Overload at the routes: X-Priority, refusals with 429 and Retry-After, and requests that are turned away unread."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields

import httpx2
import pytest
import pytest_asyncio

from services.common.admission import Admission
from services.common.app import create_service_app
from services.common.deadline import NO_DEADLINE
from services.common.metrics import Metrics
from services.common.wire.search import Priority
from services.search import routes
from services.search.batches import Batches
from services.search.resources import SearchResources
from services.search.routes.search import router
from services.search.settings import SearchSettings
from tests.integration.conftest import Serve
from tests.search_ports import make_stack

QUESTION = {"query": "why", "collection": "books", "cache": False}


class Shed(list[Priority]):
    """The priorities of what was turned away."""


@pytest.fixture
def shed() -> Shed:
    """Nothing yet."""
    return Shed()


@pytest.fixture
def admission(shed: Shed) -> Admission:
    """One that lets one search in at once and nobody wait."""
    return Admission("searches", floor=1.0, ceiling=1.0, max_waiting=0, note_shed=shed.append)


@pytest_asyncio.fixture
async def client(serve: Serve, admission: Admission) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an app with the search routes behind *admission*."""
    stack = make_stack(admission=admission)

    @asynccontextmanager
    async def build(settings: SearchSettings, metrics: Metrics) -> AsyncIterator[SearchResources]:
        parts = {field.name: None for field in fields(SearchResources)}
        batches = Batches(stack.catalog, stack.embedding, stack.pipeline)
        yield SearchResources(**{**parts, "pipeline": stack.pipeline, "batches": batches, "admission": admission})

    app = create_service_app("search", SearchSettings(), build, [router], description="Search.", door=routes.door)
    async with serve(app) as client:
        yield client


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
async def test_a_priority_may_be_said(client: httpx2.AsyncClient, priority: str) -> None:
    """X-Priority is one of three words."""
    answer = await client.post("/search", json=QUESTION, headers={"X-Priority": priority})
    assert answer.status_code == 200, answer.text


async def test_another_priority_is_refused(client: httpx2.AsyncClient) -> None:
    """Any other word is a mistake of the caller's, which the error names."""
    answer = await client.post("/search", json=QUESTION, headers={"X-Priority": "urgent"})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "x-priority"


async def test_a_search_for_which_there_is_no_place_is_refused(
    client: httpx2.AsyncClient, admission: Admission, shed: Shed
) -> None:
    """429 with Retry-After and a code that says so; it is tried again with success once there is place."""
    async with admission.enter(1.0, "normal", NO_DEADLINE):
        answer = await client.post("/search", json=QUESTION, headers={"X-Priority": "high"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.json()["error"]["retryable"] is True
    assert shed == ["high"]
    assert (await client.post("/search", json=QUESTION)).status_code == 200


async def test_many_at_once_are_of_low_priority(client: httpx2.AsyncClient, admission: Admission, shed: Shed) -> None:
    """The searches of a batch are the first to be turned away, unless the caller says otherwise."""
    async with admission.enter(1.0, "normal", NO_DEADLINE):
        for headers in ({}, {"X-Priority": "normal"}):
            answer = await client.post("/search/batch", json={"searches": [QUESTION]}, headers=headers)
            assert answer.json()["results"][0]["error"]["code"] == "overloaded"
    assert shed == ["low", "normal"]


async def test_in_overload_searches_are_turned_away_unread(client: httpx2.AsyncClient, admission: Admission) -> None:
    """With many inside and some refused just now the next is refused before its body is looked at; health is not."""
    leaves = [admission.visit("normal") for _ in range(100)]
    async with admission.enter(1.0, "normal", NO_DEADLINE):
        assert (await client.post("/search", content=b"no JSON")).status_code == 400
        assert (await client.post("/search", json=QUESTION, headers={"X-Priority": "high"})).status_code == 429
        unread = await client.post("/search", content=b"no JSON")
        assert unread.status_code == 429
        assert "retry-after" in unread.headers
        assert unread.json()["error"]["request_id"] == unread.headers["x-request-id"]
        assert (await client.get("/readyz")).status_code == 200
    for leave in leaves:
        leave()
    assert (await client.post("/search", content=b"no JSON")).status_code == 400
