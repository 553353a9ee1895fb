"""Traces, as a real OTLP/HTTP receiver gets them from real services; and what tracing must never do to them."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import orjson
import pytest
import pytest_asyncio

from services.common import trace_export
from services.embedding.app import create_app
from services.embedding.settings import EmbeddingSettings
from tests.e2e.stack import DOCUMENTS, running
from tests.integration.conftest import Serve
from tests.otlp_collector import Collector, ReceivedSpan, collecting

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
SEARCH, EMBEDDING, RERANK = "tercet-search", "tercet-embedding", "tercet-rerank"
PATIENCE_S = 10.0

STACK = pytest.mark.asyncio(loop_scope="module")


class Traced:
    """A stack that wrote documents, answered a search that a caller traced, and stopped: its spans and search's log."""

    def __init__(self, collector: Collector, log: list[dict]) -> None:
        self.collector = collector
        self.log = log

    def one(self, name: str, service: str) -> ReceivedSpan:
        """Return the only span of the search's trace that bears *name* in *service*."""
        [span] = [span for span in self.collector.named(name, service) if span.trace_id == TRACE_ID]
        return span


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traced(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    """Three real processes that trace; all was sent when they have stopped."""
    directory = tmp_path_factory.mktemp("traced")
    with collecting() as collector:
        traces = {f"{name}_OTLP_ENDPOINT": collector.endpoint for name in ("EMBEDDING", "RERANK", "SEARCH")}
        fakes = {"EMBEDDING_MODEL": "fake", "RERANK_MODEL": "fake", "SEARCH_ACCESS_LOG": "all"}
        async with running(directory, **traces, **fakes) as (stack, client):
            await client.write("facts", DOCUMENTS)
            async with httpx2.AsyncClient(base_url=stack.url, timeout=30, trust_env=False) as http:
                headers = {"traceparent": f"00-{TRACE_ID}-{CALLER}-01", "x-request-id": "abc-1"}
                body = {"collection": "facts", "query": "moon tides"}
                reply = await http.post("/search", json=body, headers=headers)
                assert reply.status_code == 200, reply.text
                for path in ("/livez", "/readyz", "/metrics"):
                    assert (await http.get(path)).status_code == 200
        lines = (directory / "logs" / "search.log").read_bytes().splitlines()
        yield Traced(collector, [orjson.loads(line) for line in lines if line.startswith(b"{")])


@STACK
async def test_a_search_is_one_trace_through_all_services(traced: Traced):
    """The caller's trace goes on through search to embedding and rerank, each call under the stage that made it."""
    search = traced.one("POST /search", SEARCH)
    assert (search.trace_id, search.parent_id, search.kind) == (TRACE_ID, CALLER, "server")
    for stage, path, service in (("search.embed", "/embed", EMBEDDING), ("search.rerank", "/rerank", RERANK)):
        made_by = traced.one(stage, SEARCH)
        call = traced.one(f"POST {path}", SEARCH)
        served = traced.one(f"POST {path}", service)
        assert made_by.parent_id == search.span_id
        assert (call.parent_id, call.kind) == (made_by.span_id, "client")
        assert (served.parent_id, served.kind) == (call.span_id, "server")
    assert {span.service for span in traced.collector.spans if span.trace_id == TRACE_ID} == {SEARCH, EMBEDDING, RERANK}
    assert not any(span.failed for span in traced.collector.spans)


@STACK
async def test_a_search_shows_its_stages(traced: Traced):
    """Each stage of the pipeline is a span under the request's, and none of them asks the ledger."""
    under = [span.name for span in traced.collector.under(traced.one("POST /search", SEARCH))]
    stages = [name for name in under if name.startswith("search.")]
    assert stages[:4] == ["search.cache", "search.embed", "search.retrieve", "search.fuse"]
    assert "search.rerank" in stages
    assert not [name for name in under if name.startswith("ledger.")]


@STACK
async def test_a_models_work_is_shown_in_its_parts(traced: Traced):
    """Tokenisation, queue and inference follow one another inside the request, and their times are in its attributes."""
    for name, service in (("POST /embed", EMBEDDING), ("POST /rerank", RERANK)):
        served = traced.one(name, service)
        parts = [traced.one(part, service) for part in ("tokenize", "queue", "inference")]
        assert [part.parent_id for part in parts] == [served.span_id] * 3
        assert parts[0].start_ns <= parts[0].end_ns <= parts[1].end_ns <= parts[2].end_ns <= served.end_ns
        assert {f"tercet.{part}_ms" for part in ("tokenization", "queue", "inference")} <= served.attributes.keys()


@STACK
async def test_request_spans_say_what_was_asked_and_answered(traced: Traced):
    """Method, route, status and request id, the same id in every service; never a query or a text."""
    for name, service in (("POST /search", SEARCH), ("POST /embed", EMBEDDING), ("POST /rerank", RERANK)):
        said = traced.one(name, service).attributes
        assert said["http.request.method"] == "POST"
        assert said["http.route"] == name.removeprefix("POST ")
        assert said["http.response.status_code"] == 200
        assert said["tercet.request_id"] == "abc-1"
    values = [value for span in traced.collector.spans for value in span.attributes.values()]
    assert not any("moon" in str(value) for value in values)


@STACK
async def test_a_write_shows_its_transaction(traced: Traced):
    """The documents' embedding and their transaction are spans under the write."""
    [append] = traced.collector.named("ledger.append", SEARCH)
    [write] = [span for span in traced.collector.spans if span.span_id == append.parent_id]
    assert (write.service, write.kind, write.attributes["http.response.status_code"]) == (SEARCH, "server", 200)
    calls = [span for span in traced.collector.under(write) if span.kind == "client"]
    assert {call.name for call in calls} >= {"POST /embed"}


@STACK
async def test_loading_a_model_is_a_span_of_the_start(traced: Traced):
    """A start is a trace of its own, in which loading the model shows."""
    for service in (EMBEDDING, RERANK):
        load = traced.collector.one("model.load", service)
        assert load.attributes["tercet.model"] == "fake"
        assert load.parent_id == traced.collector.one("start", service).span_id


@STACK
async def test_health_is_not_traced(traced: Traced):
    """Probes and scrapes, of which there is no end, make no spans; nor does work in the background."""
    roots = {span.name for span in traced.collector.spans if not span.parent_id}
    assert "start" in roots
    assert not any(path in name for name in roots for path in ("/livez", "/readyz", "/metrics"))
    assert all(name == "start" or name.split()[0] in ("GET", "POST", "PUT") for name in roots)


@STACK
async def test_logs_name_the_trace(traced: Traced):
    """A request's line in the log has the ids by which its trace is found."""
    [line] = [line for line in traced.log if line.get("request_id") == "abc-1" and line["event"] == "request"]
    search = traced.one("POST /search", SEARCH)
    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, search.span_id)


# --- one service, in this process -----------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that answers."""
    with collecting() as collector:
        yield collector


@pytest.fixture
def deaf() -> Iterator[str]:
    """The address of a collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def settings(endpoint: str, **more) -> EmbeddingSettings:
    return EmbeddingSettings(model="fake", otlp_endpoint=endpoint, **more)


async def test_nothing_is_sent_of_what_is_not_sampled(serve: Serve, collector: Collector):
    """With a ratio of 0 no request is traced, unless its caller traces it."""
    app = create_app(settings(collector.endpoint, trace_sample_ratio=0))
    async with serve(app) as client:
        for _ in range(5):
            assert (await client.post("/embed", json={"inputs": "fox"})).status_code == 200
    assert collector.posts == 0
    app = create_app(settings(collector.endpoint, trace_sample_ratio=0))
    async with serve(app) as client:
        await client.post("/embed", json={"inputs": "fox"}, headers={"traceparent": f"00-{TRACE_ID}-{CALLER}-01"})
    assert {span.trace_id for span in collector.spans} == {TRACE_ID}


async def test_a_callers_refusal_is_followed(serve: Serve, collector: Collector):
    """A caller that says its trace is not recorded has none here either."""
    async with serve(create_app(settings(collector.endpoint))) as client:
        await client.post("/embed", json={"inputs": "fox"}, headers={"traceparent": f"00-{TRACE_ID}-{CALLER}-00"})
    assert {span.name for span in collector.spans} == {"start", "model.load"}


async def test_cache_and_refusals_show(serve: Serve, collector: Collector):
    """What the cache knew, and why a request was refused, is in the spans; a refused request has not failed."""
    app = create_app(settings(collector.endpoint, otlp_service_name="vectors", cache_bytes=1_000_000))
    async with serve(app) as client:
        for _ in range(2):
            await client.post("/embed", json={"inputs": ["fox", "hen"]})
        assert (await client.post("/embed", json={"inputs": "fox", "model": "no"})).status_code == 404
        assert (await client.get("/no-such-path")).status_code == 404
    lookups = [
        (one.attributes["tercet.cache.hits"], one.attributes["tercet.cache.misses"])
        for one in sorted(collector.named("cache.get"), key=lambda span: span.start_ns)
    ]
    assert lookups == [(0, 2), (2, 0)]
    assert len(collector.named("inference")) == 1
    first, second, refused = sorted(collector.named("POST /embed"), key=lambda span: span.start_ns)
    assert first.attributes["tercet.tokens"] == second.attributes["tercet.tokens"] > 0
    assert refused.attributes["tercet.error_code"] == "not_found"
    assert not refused.failed
    assert collector.one("GET").attributes["http.response.status_code"] == 404
    assert {span.service for span in collector.spans} == {"vectors"}


async def test_a_collector_that_does_not_answer_holds_nothing_up(
    serve: Serve, deaf: str, monkeypatch: pytest.MonkeyPatch
):
    """Requests are answered, and the service stops, while the exporter waits for a collector that never answers."""
    monkeypatch.setattr(trace_export, "FLUSH_S", 0.1)
    async with asyncio.timeout(PATIENCE_S):
        async with serve(create_app(settings(deaf))) as client:
            for _ in range(600):  # More spans than one batch, so that sending has begun.
                assert (await client.post("/embed", json={"inputs": "fox"})).status_code == 200


async def test_a_collector_that_is_not_there_holds_nothing_up(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """Requests are answered, and the service stops, where nothing listens at the collector's address."""
    monkeypatch.setattr(trace_export, "FLUSH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with asyncio.timeout(PATIENCE_S):
        async with serve(create_app(settings(address))) as client:
            assert (await client.post("/embed", json={"inputs": "fox"})).status_code == 200


# --- without it -----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]

ONE_REQUEST = """
import asyncio, sys
import httpx2
from services.embedding.app import create_app as embedding
from services.embedding.settings import EmbeddingSettings
from services.rerank.app import create_app as rerank
from services.rerank.settings import RerankSettings
from services.search.app import create_app as search
from services.search.settings import SearchSettings

async def main():
    rerank(RerankSettings(model="fake"))
    search(SearchSettings())
    app = embedding(EmbeddingSettings(model="fake"))
    async with app.router.lifespan_context(app):
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://service") as client:
            assert (await client.post("/embed", json={"inputs": "fox"})).status_code == 200

asyncio.run(main())
ours = ("services.common.trace_export", "opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.proto")
print("loaded:", sorted(name for name in sys.modules if name.startswith(ours)))
"""

NOT_INSTALLED = """
import runpy, sys
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
runpy.run_module("services.rerank", {}, "__main__", True)
"""


def python(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run *program* in a process of its own, in the repository's root."""
    inherited = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=inherited | environ,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_without_a_collector_no_tracing_library_is_loaded():
    """
    While tracing is off, no service imports what records and sends spans.

    FastAPI imports OpenTelemetry's API, and redis-py the SDK's metrics where there are any, whatever we do.
    """
    done = python(ONE_REQUEST)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["loaded: []"]), done.stderr


def test_a_collector_without_the_extra_is_refused_in_one_line():
    """A service that is told to trace and cannot says what to install, and does not start."""
    done = python(NOT_INSTALLED, RERANK_MODEL="fake", RERANK_OTLP_ENDPOINT="http://127.0.0.1:4318")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "RERANK_OTLP_ENDPOINT: traces need OpenTelemetry, which is not installed: pip install 'tercet[otel]'"
    )
