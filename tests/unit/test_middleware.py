"""The middleware, driven as plain ASGI: request ids, disconnects, stray exceptions, and what metrics are labelled by."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx2
import orjson
import pytest
import structlog
from fastapi import APIRouter, FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.app import create_service_app
from services.common.errors import BodyTooLarge, NotReady
from services.common.http_errors import JsonRoute
from services.common.metrics import Metrics
from services.common.middleware.body_limit import BodyLimitMiddleware
from services.common.middleware.disconnect import WATCH_AFTER_S, DisconnectMiddleware
from services.common.middleware.request_context import RequestContextMiddleware
from services.common.settings import ServiceSettings

PATIENCE_S = 10.0


class Call:
    """One ASGI call under the test's control: what the server hands in, and what the app sent."""

    def __init__(self, app: ASGIApp, *, path: str = "/things", headers: dict[str, str] | None = None) -> None:
        self.app = app
        self.sent: list[Message] = []
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
        }

    def body(self, content: bytes = b"", *, more: bool = False) -> None:
        """Hand in a piece of the body."""
        self.incoming.put_nowait({"type": "http.request", "body": content, "more_body": more})

    def disconnect(self) -> None:
        """The caller hangs up."""
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def run(self) -> None:
        """Run the app to its end, for a bounded time."""

        async def send(message: Message) -> None:
            self.sent.append(message)

        async with asyncio.timeout(PATIENCE_S) as patience:
            await self.app(self.scope, self.incoming.get, send)
        assert not patience.expired()

    @property
    def status(self) -> int:
        return next(message["status"] for message in self.sent if message["type"] == "http.response.start")

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(next(message["headers"] for message in self.sent if message["type"] == "http.response.start"))

    @property
    def error(self) -> dict[str, Any]:
        content = b"".join(message["body"] for message in self.sent if message["type"] == "http.response.body")
        return orjson.loads(content)["error"]


async def ok(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An app that answers 200."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def read_all(receive: Receive) -> bytes:
    """Read a request's whole body."""
    content = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if not message.get("more_body", False):
            return content


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return a metric's value."""
    return metrics.registry.get_sample_value(name, labels)


# --- request ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["a", "abc-123", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "x" * 128]
)
async def test_a_sane_request_id_is_taken(given):
    """The caller's own id comes back with the answer, and is there for the logs meanwhile."""
    bound: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bound.append(structlog.contextvars.get_contextvars()["request_id"])
        await ok(scope, receive, send)

    call = Call(RequestContextMiddleware(app, Metrics("test")), headers={"x-request-id": given})
    await call.run()
    assert call.headers[b"x-request-id"] == given.encode()
    assert bound == [given]
    assert call.scope["tercet_request_id"] == given


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "né", "line\nbreak", "tab\t"])
async def test_any_other_request_id_is_replaced(given):
    """An id that could break a log line or a header is replaced by one of ours, different each time."""
    ids = set()
    for _ in range(2):
        headers = {} if given is None else {"x-request-id": given}
        call = Call(RequestContextMiddleware(ok, Metrics("test")), headers=headers)
        await call.run()
        ids.add(call.headers[b"x-request-id"])
    assert len(ids) == 2
    assert all(len(id_) == 32 and id_.isalnum() for id_ in ids)


# --- stray exceptions -----------------------------------------------------------------------------------------------


async def test_a_stray_exception_is_a_500_in_the_envelope():
    """An exception that nobody handles gives the envelope with the request id, and none of its own text."""

    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("secret")

    metrics = Metrics("test")
    call = Call(RequestContextMiddleware(broken, metrics), headers={"x-request-id": "r-9"})
    await call.run()
    assert call.status == 500
    assert call.headers[b"x-request-id"] == b"r-9"
    assert (call.error["code"], call.error["request_id"]) == ("internal_error", "r-9")
    assert "secret" not in str(call.sent)
    assert sample(metrics, "tercet_errors_total", code="internal_error") == 1
    labels = {"route": "unmatched", "method": "POST", "status": "500"}
    assert sample(metrics, "tercet_http_requests_total", **labels) == 1


async def test_an_exception_after_the_answer_began_adds_nothing_to_it():
    """Once the status is sent no second answer is written."""

    async def breaks_later(scope: Scope, receive: Receive, send: Send) -> None:
        await ok(scope, receive, send)
        raise RuntimeError("late")

    metrics = Metrics("test")
    call = Call(RequestContextMiddleware(breaks_later, metrics))
    await call.run()
    assert [message["type"] for message in call.sent] == ["http.response.start", "http.response.body"]
    assert sample(metrics, "tercet_errors_total", code="internal_error") == 1


async def test_requests_in_flight_are_counted():
    """The gauge goes up while a request is answered and down again, however it ends."""
    metrics = Metrics("test")
    during: list[float | None] = []

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        during.append(sample(metrics, "tercet_http_requests_in_flight"))
        raise RuntimeError

    await Call(RequestContextMiddleware(app, metrics)).run()
    assert during == [1]
    assert sample(metrics, "tercet_http_requests_in_flight") == 0


async def test_odd_methods_are_one_series():
    """A caller cannot make a series for each word it thinks of."""
    metrics = Metrics("test")
    app = RequestContextMiddleware(ok, metrics)
    for method in ("BREW", "X" * 1000, "post"):
        call = Call(app)
        call.scope["method"] = method
        await call.run()
    labels = {"route": "unmatched", "method": "other", "status": "200"}
    assert sample(metrics, "tercet_http_requests_total", **labels) == 3


@pytest.mark.parametrize(
    ("level", "logged"),
    [("all", ["quick", "slow", "refused", "failed"]), ("slow", ["slow", "failed"]), ("errors", ["failed"])],
)
async def test_what_is_logged(level, logged):
    """By default slow and failed requests; a health probe is never worth a line."""
    slow_s = 0.02

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path=scope["path"].strip("/"))
        if scope["path"] == "/slow":
            await asyncio.sleep(2 * slow_s)
        status = {"/refused": 422, "/failed": 503}.get(scope["path"], 200)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    context = RequestContextMiddleware(app, Metrics("test"), access_log=level, slow_s=slow_s)
    with structlog.testing.capture_logs() as logs:
        for path in ("/quick", "/slow", "/refused", "/failed", "/livez"):
            await Call(context, path=path).run()
    assert [line["route"] for line in logs if line["event"] == "request"] == logged


# --- disconnects ----------------------------------------------------------------------------------------------------


class Worker:
    """An app that reads the body, then works until it is cancelled or released."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = False
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = await read_all(receive)
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        await ok(scope, receive, send)


async def begin(call: Call, worker: Worker) -> "asyncio.Task[None]":
    """Run *call* until *worker* has read its body."""
    task = asyncio.create_task(call.run())
    async with asyncio.timeout(PATIENCE_S):
        await worker.started.wait()
    return task


async def test_a_disconnect_cancels_the_work():
    """When the caller hangs up its handler is cancelled, nothing is sent, and the request counts as 499."""
    worker, metrics = Worker(), Metrics("test")
    call = Call(RequestContextMiddleware(DisconnectMiddleware(worker), metrics))
    call.body(b"ques", more=True)
    call.body(b"tion")
    task = await begin(call, worker)
    call.disconnect()
    await task
    assert worker.cancelled
    assert worker.body == b"question"
    assert call.sent == []
    labels = {"route": "unmatched", "method": "POST", "status": "499"}
    assert sample(metrics, "tercet_http_requests_total", **labels) == 1


async def test_a_caller_that_stays_is_answered():
    """Watching for the disconnect changes nothing for the others."""
    worker = Worker()
    call = Call(DisconnectMiddleware(worker))
    call.body(b"question")
    task = await begin(call, worker)
    worker.release.set()
    await task
    assert call.status == 200
    assert not worker.cancelled


async def test_an_app_that_never_reads_the_body_is_answered():
    """A route without a body does not wait for one."""
    call = Call(DisconnectMiddleware(ok))
    await call.run()
    assert call.status == 200


async def test_a_disconnect_amid_the_body_reaches_the_reader():
    """A caller that hangs up while it sends is not waited for."""
    seen: list[str] = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            seen.append(message["type"])
        seen.append("http.disconnect")

    call = Call(DisconnectMiddleware(app))
    call.body(b"half", more=True)
    call.disconnect()
    await call.run()
    assert seen == ["http.request", "http.disconnect"]


async def test_the_handlers_own_error_passes_through():
    """An exception of the handler is not swallowed with the cancellation."""

    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await Call(DisconnectMiddleware(broken)).run()


async def test_stopping_the_server_cancels_the_work():
    """When the call itself is cancelled its handler is too."""
    worker = Worker()
    call = Call(DisconnectMiddleware(worker))
    call.body()
    task = await begin(call, worker)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert worker.cancelled


async def test_a_request_that_is_cancelled_for_two_reasons_stays_cancelled():
    """When the caller goes and the server stops at once, the server's wish is not forgotten."""
    worker = Worker()
    call = Call(DisconnectMiddleware(worker))
    call.body()
    task = await begin(call, worker)
    await asyncio.sleep(2 * WATCH_AFTER_S)
    call.disconnect()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.cancelled


async def test_after_a_disconnect_the_task_can_go_on():
    """The cancellation was this request's, not that of the task it ran in."""
    worker = Worker()
    call = Call(DisconnectMiddleware(worker))
    call.body()
    after: list[str] = []

    async def run() -> None:
        await call.run()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.sleep(0.001)
        after.append("went on")

    task = asyncio.create_task(run())
    async with asyncio.timeout(PATIENCE_S):
        await worker.started.wait()
        call.disconnect()
        await task
    assert (worker.cancelled, after) == (True, ["went on"])


async def test_quick_requests_are_not_watched():
    """What is answered at once neither starts a task nor asks the server for another message."""
    tasks: list[int] = []

    async def quick(scope: Scope, receive: Receive, send: Send) -> None:
        await read_all(receive)
        await ok(scope, receive, send)
        tasks.append(len(asyncio.all_tasks()))

    before = len(asyncio.all_tasks())
    call = Call(DisconnectMiddleware(quick))
    call.body(b"question")
    await call.run()
    await asyncio.sleep(2 * WATCH_AFTER_S)
    assert tasks == [before]
    call.disconnect()
    assert call.incoming.qsize() == 1


async def test_a_handler_may_wait_for_the_disconnect_itself():
    """Asking for another message after the body gives the disconnect once it comes."""
    seen: list[str] = []

    async def listening(_scope: Scope, receive: Receive, _send: Send) -> None:
        await read_all(receive)
        try:
            seen.append((await receive())["type"])
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    call = Call(DisconnectMiddleware(listening))
    call.body()
    task = asyncio.create_task(call.run())
    await asyncio.sleep(0)
    call.disconnect()
    await task
    assert seen == ["cancelled"]


# --- the body limit -------------------------------------------------------------------------------------------------


async def test_a_stated_length_over_the_limit_is_refused_unread():
    """The app is not called, and nothing is received."""
    call = Call(BodyLimitMiddleware(Worker(), 10), headers={"content-length": "11"})
    await call.run()
    assert (call.status, call.error["param"]) == (413, "body")


async def test_only_bodies_of_no_stated_length_are_counted():
    """The server keeps a stated length; what comes in chunks is counted as it arrives."""

    async def reader(_scope: Scope, receive: Receive, _send: Send) -> None:
        await read_all(receive)

    for headers in ({}, {"content-length": "6"}):
        call = Call(BodyLimitMiddleware(reader, 5), headers=headers)
        call.body(b"abc", more=True)
        call.body(b"def")
        if headers:
            await call.run()
            assert call.status == 413
        else:
            with pytest.raises(BodyTooLarge):
                await call.run()


async def test_other_scopes_pass_through():
    """The lifespan is none of these middlewares' business."""
    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    chain = RequestContextMiddleware(DisconnectMiddleware(BodyLimitMiddleware(app, 10)), Metrics("test"))
    await chain({"type": "lifespan"}, SimpleNamespace(), SimpleNamespace())
    assert seen == ["lifespan"]


# --- in the whole app -----------------------------------------------------------------------------------------------


class Resources:
    """Resources whose problems the test sets."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def problems(self) -> list[str]:
        return self.found


@pytest.fixture
def resources() -> Resources:
    """Resources that are well."""
    return Resources()


@pytest.fixture
def app(resources: Resources) -> FastAPI:
    """A service with one route that has a parameter in its path, and one that breaks."""
    router = APIRouter(route_class=JsonRoute)

    @router.get("/things/{thing}")
    async def thing(thing: str) -> str:
        return thing

    @router.get("/broken")
    async def broken(request: Request) -> None:
        raise KeyError("secret")

    @asynccontextmanager
    async def build(_settings: ServiceSettings, _metrics: Metrics) -> AsyncIterator[Resources]:
        yield resources

    return create_service_app("test", ServiceSettings(), build, [router], description="")


@pytest.fixture
async def get(app: FastAPI) -> AsyncIterator[Callable[[str], Awaitable[httpx2.Response]]]:
    """Send GET requests to the app, whether or not its lifespan runs."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        yield client.get


async def test_metrics_are_labelled_by_route(app, get):
    """However many paths are asked for, a route is one series, and what matches no route is one more."""
    async with app.router.lifespan_context(app):
        for number in range(20):
            assert (await get(f"/things/{number}")).status_code == 200
            assert (await get(f"/nowhere/{number}")).status_code == 404
        exposition = (await get("/metrics")).text
    assert 'tercet_http_requests_total{method="GET",route="/things/{thing}",status="200"} 20.0' in exposition
    assert 'tercet_http_requests_total{method="GET",route="unmatched",status="404"} 20.0' in exposition
    assert "/things/1" not in exposition


async def test_a_route_that_breaks_is_a_500_with_a_request_id(app, get):
    """A bug in a route is answered in the envelope, and the service goes on."""
    async with app.router.lifespan_context(app):
        response = await get("/broken")
        assert response.status_code == 500
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]
        assert "secret" not in response.text
        assert (await get("/things/1")).status_code == 200


async def test_health_before_during_and_after(app, get, resources):
    """Before the lifespan a service is alive and not ready; with a problem it is neither; while it drains, not ready."""

    async def health() -> tuple[int, int]:
        return (await get("/livez")).status_code, (await get("/readyz")).status_code

    assert await health() == (200, 503)
    async with app.router.lifespan_context(app):
        assert await health() == (200, 200)
        resources.found = ["the worker is dead"]
        assert await health() == (503, 503)
        assert (await get("/livez")).json()["problems"] == ["the worker is dead"]
        resources.found = []
    assert await health() == (200, 503)
    assert (await get("/readyz")).json()["problems"] == ["draining"]


async def test_a_start_that_fails_is_told_in_one_line():
    """When the resources cannot be built the server hears why, without a traceback of ours."""

    @asynccontextmanager
    async def build(_settings: ServiceSettings, _metrics: Metrics) -> AsyncIterator[Resources]:
        raise NotReady("the disk is full")
        yield

    app = create_service_app("test", ServiceSettings(), build, [], description="")
    sent: list[Message] = []
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    incoming.put_nowait({"type": "lifespan.startup"})

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(NotReady):
        await app({"type": "lifespan", "state": {}}, incoming.get, send)
    assert sent == [{"type": "lifespan.startup.failed", "message": "Cannot start: the disk is full"}]
