"""Spans as the code knows them, the middleware that begins them, and the ids in logs."""

import asyncio
import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import orjson
import pytest
import structlog
from starlette.types import Message, Receive, Scope, Send

from services.common.logs import configure_logs
from services.common.middleware.tracing import TracingMiddleware
from services.common.settings import SettingsError, read_settings
from services.common.trace_export import traces_url
from services.common.tracing import Attributes, Kind, annotate, current_ids, inject, record_work, span, under
from services.embedding.settings import EmbeddingSettings
from tests.unit.test_middleware import Call, ok


class Recorded:
    """A span that is kept; *recorded* false makes one that was not sampled."""

    def __init__(
        self, name: str, kind: Kind = "internal", *, start_ns: int | None = None, recorded: bool = True
    ) -> None:
        self.name = name
        self.kind = kind
        self.open = recorded
        self.trace_id = "a" * 32
        self.span_id = f"{id(self):016x}"
        self.start_ns = start_ns
        self.end_ns: int | None = None
        self.error_type: str | None = None
        self.attributes: dict[str, object] = {}
        self.children: list[Recorded] = []

    def child(self, name: str, kind: Kind = "internal", *, start_ns: int | None = None) -> "Recorded":
        self.children.append(Recorded(name, kind, start_ns=start_ns))
        return self.children[-1]

    def set(self, attributes: Attributes) -> None:
        self.attributes |= attributes

    def rename(self, name: str) -> None:
        self.name = name

    def headers(self) -> Mapping[str, str]:
        return {"traceparent": f"00-{self.trace_id}-{self.span_id}-{int(self.open):02d}"}

    def end(self, *, error_type: str | None = None, end_ns: int | None = None) -> None:
        self.error_type = self.error_type or error_type
        self.end_ns = end_ns
        self.open = False


@dataclass
class Roots:
    """Begins traces, and remembers them with the headers they came with."""

    recorded: bool = True
    begun: list[Recorded] = field(default_factory=list)
    carried: list[Mapping[str, str]] = field(default_factory=list)

    def root(self, name: str, kind: Kind = "internal", *, headers: Mapping[str, str] | None = None) -> Recorded:
        self.begun.append(Recorded(name, kind, recorded=self.recorded))
        self.carried.append(headers or {})
        return self.begun[-1]


@dataclass
class Done:
    """What a batcher says of work."""

    tokenization_ms: float
    queue_ms: float
    inference_ms: float


def names(parent: Recorded) -> list[str]:
    return [child.name for child in parent.children]


# --- spans ----------------------------------------------------------------------------------------------------------


def test_without_a_current_span_nothing_is_made():
    """While nothing is traced, `span` gives the same idle object each time, and nothing else does anything."""
    assert span("one") is span("another", "client")
    with span("one") as idle:
        idle.set({"tercet.model": "fake"})
        annotate({"tercet.tokens": 3})
        record_work(Done(1, 2, 3))
        headers: dict[str, str] = {}
        inject(headers)
    assert headers == {}
    assert current_ids() is None


def test_spans_nest_as_the_code_does():
    """A span is a child of the one it is entered in; after it, the outer one is current again."""
    root = Recorded("root")
    with under(root):
        with span("outer"), span("inner", "client") as inner:
            inner.set({"tercet.peer": "rerank"})
        with span("next"):
            pass
    assert names(root) == ["outer", "next"]
    [child] = root.children[0].children
    assert (child.name, child.kind, child.attributes, child.open) == (
        "inner",
        "client",
        {"tercet.peer": "rerank"},
        False,
    )
    assert not root.open
    assert current_ids() is None


def test_what_is_raised_marks_the_span():
    """An exception passes through, and leaves the name of its class, not its message, which may quote a text."""
    root = Recorded("root")
    with under(root), contextlib.suppress(ValueError), span("stage"):
        raise ValueError("a text")
    assert root.children[0].error_type == "ValueError"
    assert root.children[0].attributes == {}
    assert root.error_type is None


def test_an_unsampled_request_has_no_children_but_tells_its_peers():
    """Where a request is not recorded, nothing is, and services called for it hear of that decision."""
    root = Recorded("root", recorded=False)
    headers: dict[str, str] = {}
    with under(root):
        assert span("stage") is span("other")
        record_work(Done(1, 2, 3))
        inject(headers)
    assert headers["traceparent"].endswith("-00")
    assert root.children == []


async def test_work_that_outlives_its_request_is_not_recorded():
    """A task that a request started makes no spans once the request has ended: its trace would never end."""
    root = Recorded("root")
    over = asyncio.Event()

    async def background() -> None:
        with span("during"):
            pass
        await over.wait()
        with span("after"):
            pass

    with under(root):
        task = asyncio.create_task(background())
        await asyncio.sleep(0)
    over.set()
    await task
    assert names(root) == ["during"]


def test_a_models_work_ends_now_and_its_parts_follow_one_another():
    """The three spans are as long as the times measured, end to end, and the request's span has the times."""
    root = Recorded("root")
    with under(root):
        record_work(Done(1.5, 2.0, 3.0))
    spans = [(one.name, one.end_ns - one.start_ns) for one in root.children]
    assert spans == [("tokenize", 1_500_000), ("queue", 2_000_000), ("inference", 3_000_000)]
    first, second, third = root.children
    assert (first.end_ns, second.end_ns) == (second.start_ns, third.start_ns)
    assert root.attributes == {"tercet.tokenization_ms": 1.5, "tercet.queue_ms": 2.0, "tercet.inference_ms": 3.0}


# --- requests -------------------------------------------------------------------------------------------------------


async def test_a_request_has_a_span_named_by_its_route():
    """Method and route template name it; the raw path, of which there is no end, does not."""

    class Route:
        path = "/things/{name}"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"], scope["tercet_request_id"] = Route(), "abc"
        await ok(scope, receive, send)

    roots = Roots()
    given = {"traceparent": "00-" + "b" * 32 + "-" + "c" * 16 + "-01", "tracestate": "vendor=1", "accept": "*/*"}
    await Call(TracingMiddleware(app, roots), path="/things/secret", headers=given).run()
    [root] = roots.begun
    assert (root.name, root.kind, root.open, root.error_type) == ("POST /things/{name}", "server", False, None)
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/things/{name}",
        "http.response.status_code": 200,
        "tercet.request_id": "abc",
    }
    assert roots.carried == [{name: given[name] for name in ("traceparent", "tracestate")}]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/tei/health"])
async def test_health_has_no_span(path):
    """Probes and scrapes are served as ever."""
    roots = Roots()
    call = Call(TracingMiddleware(ok, roots), path=path)
    await call.run()
    assert (call.status, roots.begun) == (200, [])


@pytest.mark.parametrize(("status", "error_type"), [(200, None), (404, None), (429, None), (500, "500"), (503, "503")])
async def test_only_our_own_failures_fail_a_span(status, error_type):
    """A request that was refused was served well; one that ended in a 5xx was not."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    roots = Roots()
    await Call(TracingMiddleware(app, roots)).run()
    assert roots.begun[0].error_type == error_type
    assert roots.begun[0].attributes["http.response.status_code"] == status


async def test_a_caller_that_went_is_499():
    """A request that ended without an answer, as its caller hung up, has the status that the metrics give it."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        pass

    roots = Roots()
    call = Call(TracingMiddleware(app, roots))
    await call.run()
    assert roots.begun[0].attributes["http.response.status_code"] == 499
    assert roots.begun[0].error_type is None


async def test_an_unsampled_request_is_served():
    """A request that is not recorded is answered the same, and others hear that it is not."""
    carried: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inject(carried)
        await ok(scope, receive, send)

    roots = Roots(recorded=False)
    call = Call(TracingMiddleware(app, roots))
    await call.run()
    assert call.status == 200
    assert carried["traceparent"].endswith("-00")
    assert roots.begun[0].attributes == {}


async def test_the_lifespan_passes():
    """What is no request is not touched."""
    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(_message: Message) -> None:
        raise AssertionError("nothing is sent")

    roots = Roots()
    await TracingMiddleware(app, roots)({"type": "lifespan"}, receive, send)
    assert (seen, roots.begun) == (["lifespan"], [])


# --- logs and settings ----------------------------------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Where JSON logs go for the length of a test."""
    written = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", written)
    configure_logs("embedding", level="info", log_format="json")
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_logs_have_the_ids_of_the_current_span(logged: io.StringIO):
    """Our own lines and those of libraries name trace and span, and neither where nothing is traced."""
    root = Recorded("root")
    with under(root):
        structlog.get_logger("ours").info("one")
        logging.getLogger("theirs").info("two")
    structlog.get_logger("ours").info("three")
    one, two, three = (orjson.loads(line) for line in logged.getvalue().splitlines())
    assert (one["trace_id"], one["span_id"]) == (two["trace_id"], two["span_id"]) == (root.trace_id, root.span_id)
    assert "trace_id" not in three
    assert "span_id" not in three


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://api.example.com/otlp/v1/traces", "https://api.example.com/otlp/v1/traces"),
    ],
)
def test_a_collectors_address_need_not_name_the_path(endpoint, url):
    """OTLP's path is added to a bare address; one that has a path is taken as it is."""
    assert traces_url(endpoint) == url


@pytest.mark.parametrize(
    ("variable", "value"),
    [("EMBEDDING_OTLP_ENDPOINT", "collector:4318"), ("EMBEDDING_TRACE_SAMPLE_RATIO", "1.5")],
)
def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch, variable, value):
    """An address without a scheme and a ratio over 1 name themselves."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable):
        read_settings(EmbeddingSettings, {variable: value})
