"""Errors at the HTTP edge: one envelope, the right status, and the field that is at fault."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
import orjson
import pytest
from fastapi import APIRouter
from pydantic import Field

from services.common import errors
from services.common.app import create_service_app
from services.common.http_errors import STATUS, DialectTable, JsonRoute, error_response, status_of
from services.common.metrics import Metrics
from services.common.settings import ServiceSettings
from services.common.wire.base import Metadata, NonBlankText, RequestModel, Vector

MAX_BODY_BYTES = 4096
DIALECTS = {"/v1": "openai", "/tei": "tei", "/api/v1": "plain"}


class Part(RequestModel):
    """One branch of a union."""

    text: str


class Order(RequestModel):
    """A request with all that makes validation errors hard to read: unions, nesting, limits, free keys."""

    inputs: NonBlankText | Annotated[list[NonBlankText], Field(min_length=1, max_length=3)]
    parts: list[str | Part] = Field(default_factory=list)
    vector: Vector | None = None
    metadata: Metadata = Field(default_factory=dict)
    top_n: Annotated[int, Field(ge=1)] | None = None


def _subclasses(cls: type[errors.TercetError]) -> Iterator[type[errors.TercetError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _subclasses(sub)


TREE = [cls for cls in _subclasses(errors.TercetError) if cls.__module__ == errors.__name__]


def make_router(prefix: str) -> APIRouter:
    """Return routes that read an order, and that raise any error of the tree by its class's name."""
    router = APIRouter(route_class=JsonRoute, prefix=prefix)

    @router.post("/order")
    async def order(body: Order) -> dict[str, Any]:
        return body.model_dump()

    @router.post("/direct/order")
    async def direct_order(body: Order) -> Order:
        return body

    @router.get("/raise/{name}")
    async def raise_error(name: str) -> None:
        raise getattr(errors, name)("this went wrong", param="thing")

    @router.get("/number")
    async def number(k: int) -> int:
        return k

    return router


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
    """A client of a service with the routes above, native and in each dialect."""
    routers = [make_router(prefix) for prefix in ("", *DIALECTS)]
    settings = ServiceSettings(max_body_bytes=MAX_BODY_BYTES)
    app = create_service_app("test", settings, build, routers, description="", dialects=DIALECTS)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


@pytest.fixture(params=["/order", "/direct/order"])
def refused(client: httpx2.AsyncClient, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Send an order that is refused, by the framework or directly; return the status and the error's body."""
    path = request.param

    async def refused(body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"content-type": "application/json", **headers}
        response = await client.post(path, content=content, headers=headers)
        return response.status_code, response.json()["error"]

    return refused


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
async def test_every_error_leaves_in_the_envelope(client, cls):
    """Whatever is raised, the answer is one object with code, message, type, field, retryability and request id."""
    response = await client.get(f"/raise/{cls.__name__}", headers={"x-request-id": "r-1"})
    assert response.status_code == STATUS[cls]
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "error": {
            "code": cls.code,
            "message": "this went wrong",
            "type": cls.type,
            "param": "thing",
            "retryable": cls.retryable,
            "request_id": "r-1",
        }
    }


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
async def test_retry_after_comes_where_a_retry_may_help(client, cls):
    """Overload and unavailability say when to try again; a deadline that passed and a fault of the caller's do not."""
    response = await client.get(f"/raise/{cls.__name__}")
    expected = cls.retryable and cls is not errors.DeadlineExceeded
    assert ("retry-after" in response.headers) == expected


@pytest.mark.parametrize(("seconds", "header"), [(None, "1"), (0.2, "1"), (7.4, "8"), (30, "30")])
def test_retry_after_is_whole_seconds(seconds, header):
    """Retry-After is whole seconds, never sooner than a retry can help, and at least one."""
    response = error_response(errors.Overloaded("full", retry_after_s=seconds), request_id=None)
    assert response.headers["retry-after"] == header


# native, openai, tei with its error_type, plain
STATUSES = {
    "Malformed": (400, 400, 422, "Validation", 400),
    "Unauthenticated": (401, 401, 401, "Validation", 401),
    "Forbidden": (403, 403, 403, "Validation", 403),
    "InvalidInput": (422, 400, 422, "Validation", 422),
    "EmptyInput": (422, 400, 400, "Empty", 422),
    "ContextTooLong": (422, 400, 422, "Validation", 422),
    "NotTokenizable": (422, 400, 422, "Tokenizer", 422),
    "TooLarge": (413, 400, 422, "Validation", 413),
    "BodyTooLarge": (413, 400, 413, "Validation", 413),
    "NotFound": (404, 404, 404, "Validation", 404),
    "Overloaded": (429, 429, 429, "Overloaded", 429),
    "RateLimited": (429, 429, 429, "Overloaded", 429),
    "NotReady": (503, 503, 503, "Unhealthy", 503),
    "DeadlineExceeded": (504, 504, 504, "Overloaded", 504),
    "BackendFailed": (500, 500, 424, "Backend", 500),
    "OutOfMemory": (503, 503, 503, "Unhealthy", 503),
}


@pytest.mark.parametrize("name", STATUSES)
async def test_each_dialect_has_its_own_statuses(client, name):
    """OpenAI's SDK expects 400 for the caller's faults; TEI has a type for each; the plain services have ours."""
    native, openai, tei, tei_type, plain = STATUSES[name]
    assert (await client.get(f"/raise/{name}")).status_code == native
    answer = await client.get(f"/v1/raise/{name}")
    assert answer.status_code == openai
    assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()
    answer = await client.get(f"/tei/raise/{name}")
    assert (answer.status_code, answer.json()) == (tei, {"error": "this went wrong", "error_type": tei_type})
    answer = await client.get(f"/api/v1/raise/{name}")
    code = getattr(errors, name).code
    assert answer.status_code == plain
    assert answer.json() == {"error": "this went wrong", "code": code, "message": "this went wrong"}
    assert answer.headers["x-request-id"]


async def _every_refusal(client: httpx2.AsyncClient, prefix: str) -> dict[str, httpx2.Response]:
    """Return an answer to a bad field, broken JSON, a body over the limit, a wrong method and a missing route."""
    as_json = {"content-type": "application/json"}
    return {
        "field": await client.post(f"{prefix}/order", json={"inputs": 5}),
        "direct field": await client.post(f"{prefix}/direct/order", json={"inputs": 5}),
        "broken": await client.post(f"{prefix}/order", content=b"{", headers=as_json),
        "large": await client.post(f"{prefix}/order", content=b"x" * (MAX_BODY_BYTES + 1), headers=as_json),
        "method": await client.delete(f"{prefix}/order"),
        "route": await client.get(f"{prefix}/nowhere"),
    }


@pytest.mark.parametrize(
    ("prefix", "statuses", "keys"),
    [
        ("", [422, 422, 400, 413, 405, 404], {"error"}),
        ("/v1", [400, 400, 400, 400, 405, 404], {"error"}),
        ("/tei", [422, 422, 422, 413, 405, 404], {"error", "error_type"}),
        ("/api/v1", [422, 422, 400, 413, 405, 404], {"error", "code", "message"}),
    ],
)
async def test_the_dialect_holds_wherever_an_error_is_raised(client, prefix, statuses, keys):
    """Errors of the parser, the middleware and the router are in the shape of the path's dialect too."""
    answers = await _every_refusal(client, prefix)
    assert [answer.status_code for answer in answers.values()] == statuses
    assert all(answer.json().keys() == keys for answer in answers.values())
    assert answers["method"].headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "native"),
        ("/v1", "openai"),
        ("/v1/", "openai"),
        ("/v1/embeddings", "openai"),
        ("/v10/embeddings", "native"),
        ("/v1/plain", "plain"),
        ("/v1/plain/x", "plain"),
        ("/v1/plainer", "openai"),
    ],
)
def test_the_longest_prefix_of_whole_segments_wins(path, name):
    """A dialect's prefix may lie within another's, and a longer word is another word."""
    assert DialectTable({"/v1": "openai", "/v1/plain": "plain"}).of(path) == name


def test_an_unknown_dialect_is_refused_at_start():
    """A name that stands for nothing cannot wait for the first error."""
    with pytest.raises(ValueError, match="esperanto"):
        DialectTable({"/v1": "esperanto"})


def test_a_new_subclass_has_its_parents_status():
    """An error without a row is answered as the nearest class that has one."""

    class Special(errors.DependencyUnavailable):
        pass

    assert status_of(Special("x")) == 503
    assert status_of(Special("x"), "openai") == 503


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"inputs": 5}, 422, "inputs", "valid string"),
        ({"inputs": []}, 422, "inputs", "at least 1 item"),
        ({"inputs": ["a"] * 4}, 413, "inputs", "at most 3 items"),
        ({"inputs": ["a", 5]}, 422, "inputs.1", "valid string"),
        ({"inputs": ["a", " "]}, 422, "inputs.1", "empty"),
        ({"inputs": "a\0b"}, 422, "inputs", "null byte"),
        ({"inputs": "a", "parts": ["a", 5]}, 422, "parts.1", "valid"),
        ({"inputs": "a", "parts": [{"text": 5}]}, 422, "parts.0.text", "valid string"),
        ({"inputs": "a", "parts": [{}]}, 422, "parts.0.text", "required"),
        ({"inputs": "a", "parts": [{"text": "a", "x": 1}]}, 422, "parts.0.x", "not a known field"),
        ({"inputs": "a", "vector": [1.0, "x"]}, 422, "vector.1", "valid number"),
        ({"inputs": "a", "vector": [1.0, None]}, 422, "vector.1", "valid number"),
        ({"inputs": "a", "metadata": {"k": {"nested": 1}}}, 422, "metadata.k", "must be a string, a finite number"),
        ({"inputs": "a", "metadata": {"a[b]": {"nested": 1}}}, 422, "metadata.a[b]", "must be a string"),
        ({"inputs": "a", "metadata": {"str": None}}, 422, "metadata.str", "must be a string"),
        ({"inputs": "a", "metadata": {"": 1}}, 422, "metadata.", "at least 1 character"),
        ({"inputs": "a", "top_n": 0}, 422, "top_n", "greater than or equal to 1"),
        ({"inputs": "a", "top_n": "3"}, 422, "top_n", "valid integer"),
        ({"inputs": "a", "top_n": True}, 422, "top_n", "valid integer"),
        ({"inputs": "a", "colour": 1}, 422, "colour", "not a known field"),
        ({"inputs": "a", "str": 1}, 422, "str", "not a known field"),
        ({"inputs": "a", "a[b]": 1}, 422, "a[b]", "not a known field"),
        ({}, 422, "inputs", "required"),
    ],
)
async def test_the_field_at_fault_is_named_as_the_caller_wrote_it(refused, body, status, param, says):
    """Of a union's errors the one of the branch that was meant is told, without the names of our types."""
    got, error = await refused(body)
    assert (got, error["param"]) == (status, param)
    assert error["message"].startswith(f"{param}: ")
    assert says in error["message"]
    assert not any(word in error["message"] for word in ("function-", "list[", "Part", "constrained"))


async def test_several_errors_are_counted(refused):
    """One error is told in full, and how many more there are."""
    _, error = await refused({"inputs": "a", "top_n": 0, "colour": 1})
    assert error["message"].endswith("(and 1 more)")


async def test_a_long_field_name_is_not_echoed_whole(refused):
    """An unknown field with a name of thousands of characters gives a short error."""
    _, error = await refused({"inputs": "a", "x" * 3000: 1})
    assert set(error["param"]) == {"x"}
    assert len(error["message"]) < 300


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"null", b"5", b'[{"inputs": "a"}]'])
async def test_a_body_that_is_no_object_is_malformed(refused, body):
    """JSON that is not an object is refused with the header that it should come with."""
    status, error = await refused(body)
    assert (status, error["code"], error["param"]) == (400, "malformed_request", "body")
    assert "JSON object" in error["message"]


async def test_a_body_of_another_type_is_malformed(refused):
    """JSON that is sent as text is refused, and the message names the header."""
    status, error = await refused({"inputs": "a"}, **{"content-type": "text/plain"})
    assert (status, error["param"]) == (400, "body")
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": ',
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\xed\xa0\x80"}',
        b'{"inputs": "a", "vector": [NaN]}',
        b'{"inputs": "a", "vector": [Infinity]}',
        b"{'inputs': 'a'}",
        b"\x00",
        b"[" * 4000,
    ],
)
async def test_what_is_not_json_is_malformed(refused, body):
    """Broken JSON, invalid UTF-8, lone surrogates, NaN and deep nesting are refused before any field is looked at."""
    status, error = await refused(body)
    assert (status, error["code"], error["param"]) == (400, "malformed_request", "body")


async def test_an_empty_body_is_missing(refused):
    """No body at all is told as such."""
    status, error = await refused(b"")
    assert (status, error["param"]) == (422, "body")


async def test_a_wrong_key_says_how_to_send_one(client):
    """401 names the scheme, as HTTP asks for."""
    assert (await client.get("/raise/Unauthenticated")).headers["www-authenticate"] == "Bearer"


async def test_a_body_over_the_limit_is_refused_unread(refused):
    """A stated length over the limit is 413, with both sizes."""
    status, error = await refused(b"x" * (MAX_BODY_BYTES + 1))
    assert (status, error["code"], error["param"]) == (413, "too_large", "body")
    assert "4,097" in error["message"]
    assert "4,096" in error["message"]


async def test_a_chunked_body_over_the_limit_is_refused_as_it_arrives(client):
    """Without a stated length the bytes are counted, and the rest is not read."""
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 1024

    response = await client.post("/order", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
    assert sent < 20


async def test_a_body_at_the_limit_is_read(client):
    """The limit itself is allowed."""
    body = orjson.dumps({"inputs": "x" * (MAX_BODY_BYTES - len('{"inputs":""}'))})
    assert len(body) == MAX_BODY_BYTES
    assert (await client.post("/order", content=body, headers={"content-type": "application/json"})).status_code == 200


async def test_a_bad_content_length_is_malformed(refused):
    """A length that is no number is refused."""
    status, error = await refused(b"", **{"content-length": "many"})
    assert (status, error["param"]) == (400, "content-length")


async def test_the_frameworks_errors_are_in_the_envelope(client):
    """A missing route, a wrong method and a bad query parameter look like every other error."""
    missing = await client.get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    method = await client.delete("/order")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    query = await client.get("/number", params={"k": "x"})
    assert (query.status_code, query.json()["error"]["param"]) == (422, "k")


async def test_every_error_code_is_counted_from_the_start(client):
    """/metrics has a series for each error code before the first error, and counts them."""
    before = (await client.get("/metrics")).text
    for cls in TREE:
        assert f'tercet_errors_total{{code="{cls.code}"}} 0.0' in before
    await client.get("/raise/Conflict")
    assert 'tercet_errors_total{code="conflict"} 1.0' in (await client.get("/metrics")).text
