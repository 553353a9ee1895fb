"""The short way to a route: which endpoints take it, and that it answers as the framework would."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx2
import pytest
from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.types import Receive, Scope, Send

from services.common.app import create_service_app
from services.common.direct_routes import DirectRoutes
from services.common.errors import Conflict
from services.common.http_errors import JsonRoute
from services.common.metrics import Metrics
from services.common.settings import ServiceSettings
from services.common.wire.base import ReplyModel, RequestModel


class Order(RequestModel):
    """What is sent."""

    text: str
    count: int = 1


class Answer(ReplyModel):
    """What is answered."""

    text: str
    note: str | None = None


async def _nothing() -> None:
    """A dependency."""


def make_router() -> APIRouter:
    """Return endpoints of all kinds; each answers with the same shape."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/both", status_code=201, response_model_exclude_none=True)
    async def both(request: Request, body: Order) -> Answer:
        return Answer(text=f"{body.text} {request.headers['x-mark']} {(await request.json())['text']}")

    @router.post("/body")
    async def body_alone(body: Order) -> Response:
        return Response(body.text * body.count)

    @router.get("/request")
    async def request_alone(request: Request) -> Response:
        return Response(request.url.path)

    @router.get("/conflict")
    async def conflict(request: Request) -> Response:
        raise Conflict("taken", param="name")

    @router.get("/bug")
    async def bug(request: Request) -> Response:
        raise KeyError("secret")

    @router.get("/by/{name}")
    async def by_name(request: Request, name: str) -> Answer:
        return Answer(text=name)

    @router.get("/by/me")
    async def by_me(request: Request) -> Answer:
        return Answer(text="never reached")

    @router.get("/query")
    async def query(request: Request, q: Annotated[str, Query()]) -> Answer:
        return Answer(text=q)

    @router.post("/maybe")
    async def maybe(body: Order | None = None) -> Answer:
        return Answer(text=body.text if body else "")

    @router.get("/dependent", dependencies=[Depends(_nothing)])
    async def dependent(request: Request) -> Answer:
        return Answer(text="x")

    @router.get("/blocking")
    def blocking(request: Request) -> Answer:
        return Answer(text="x")

    @router.get("/unnamed")
    async def unnamed(request: Request) -> dict[str, str]:
        return {"text": "x"}

    return router


async def not_served(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Stands where the framework is."""
    raise AssertionError("left to the framework")


@pytest.mark.parametrize("method_and_path", [("POST", "/both"), ("POST", "/body"), ("GET", "/request")])
def test_the_request_and_one_body_is_all_that_may_be_asked_for(method_and_path):
    """Such endpoints are served directly."""
    assert method_and_path in DirectRoutes(not_served, make_router().routes)


@pytest.mark.parametrize(
    "method_and_path",
    [
        ("GET", "/by/{name}"),
        ("GET", "/by/me"),
        ("GET", "/query"),
        ("POST", "/maybe"),
        ("GET", "/dependent"),
        ("GET", "/blocking"),
        ("GET", "/unnamed"),
        ("GET", "/both"),
        ("HEAD", "/request"),
        ("POST", "/both/"),
    ],
)
def test_everything_else_is_the_frameworks(method_and_path):
    """Parameters, dependencies, threads, free shapes, other methods, and paths that an earlier route takes."""
    assert method_and_path not in DirectRoutes(not_served, make_router().routes)


class Nothing:
    """Resources of a service that has none."""

    def problems(self) -> list[str]:
        return []


@asynccontextmanager
async def build(_settings: ServiceSettings, _metrics: Metrics) -> AsyncIterator[Nothing]:
    """Build nothing."""
    yield Nothing()


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with the endpoints above."""
    app = create_service_app("test", ServiceSettings(), build, [make_router()], description="")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        yield client


async def test_the_answer_is_as_declared(client):
    """Status, omitted nulls, the media type and the request are as the route says."""
    answer = await client.post("/both", json={"text": "a"}, headers={"x-mark": "m"})
    assert (answer.status_code, answer.content) == (201, b'{"text":"a m a"}')
    assert answer.headers["content-type"] == "application/json"
    assert (await client.get("/request")).text == "/request"


async def test_a_body_in_pieces_is_one_body(client):
    """A body that comes in chunks is put together; a JSON type with a suffix or a charset is JSON."""

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"te', b'xt": "', "ä".encode()[:1], "ä".encode()[1:], b'", "count": 2}'):
            yield piece

    for media_type in ("application/json", "application/json; charset=utf-8", "application/x+json"):
        answer = await client.post("/body", content=pieces(), headers={"content-type": media_type})
        assert answer.text == "ää"


async def test_what_an_endpoint_raises_is_answered(client):
    """An error of ours is itself; a bug is a 500 that tells nothing; both count under the route."""
    assert (await client.get("/conflict")).json()["error"]["param"] == "name"
    bug = await client.get("/bug")
    assert (bug.status_code, bug.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in bug.text
    exposition = (await client.get("/metrics")).text
    assert 'tercet_http_requests_total{method="GET",route="/conflict",status="409"} 1.0' in exposition
    assert 'tercet_http_requests_total{method="GET",route="/bug",status="500"} 1.0' in exposition


async def test_other_routes_still_answer(client):
    """What is left to the framework works as ever, errors included."""
    assert (await client.get("/by/me")).json() == {"text": "me", "note": None}
    assert (await client.get("/query", params={"q": "x"})).json()["text"] == "x"
    assert (await client.get("/query")).json()["error"]["param"] == "q"
    assert (await client.post("/maybe")).json()["text"] == ""
    assert (await client.get("/both")).status_code == 405
    assert (await client.get("/dependent")).status_code == 200


async def test_the_documentation_knows_all_routes(client):
    """The OpenAPI document has the body's and the reply's shape of a direct route."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    both = paths["/both"]["post"]
    assert both["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Order"}
    assert both["responses"]["201"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Answer"}


async def test_a_caller_that_leaves_amid_the_body_is_malformed():
    """The endpoint is not called with half a body."""
    routes = DirectRoutes(not_served, make_router().routes)
    incoming = [{"type": "http.request", "body": b'{"text"', "more_body": True}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    await routes({"type": "http", "method": "POST", "path": "/body", "headers": headers}, receive, send)
    assert sent[0]["status"] == 400
