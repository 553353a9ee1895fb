"""
Spans recorded by OpenTelemetry and sent by OTLP over HTTP: the one place that knows the library, imported only if it is used.

Sending happens in a thread of its own, in batches, from a bounded queue: a collector that is slow or gone costs requests
nothing, and spans over the bound are dropped.
"""

import asyncio
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.tracing import Attributes, Kind, Span

FLUSH_S = 2.0  # What is left at the end may take this long to send.
TRACES_PATH = "/v1/traces"

_KINDS: dict[Kind, SpanKind] = {"internal": SpanKind.INTERNAL, "client": SpanKind.CLIENT, "server": SpanKind.SERVER}
_W3C = TraceContextTextMapPropagator()


class OtlpSpan:
    """See Span."""

    __slots__ = ("_context", "_ended", "_span", "_tracer", "open")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())
        self._ended = False
        self.open: bool = span.is_recording()

    @property
    def trace_id(self) -> str:
        """See Span."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @property
    def span_id(self) -> str:
        """See Span."""
        return trace.format_span_id(self._span.get_span_context().span_id)

    def child(self, name: str, kind: Kind = "internal", *, start_ns: int | None = None) -> Span:
        """See Span."""
        return OtlpSpan(self._tracer, self._tracer.start_span(name, self._context, _KINDS[kind], start_time=start_ns))

    def set(self, attributes: Attributes) -> None:
        """See Span."""
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        """See Span."""
        self._span.update_name(name)

    def headers(self) -> Mapping[str, str]:
        """See Span."""
        headers: dict[str, str] = {}
        if not self._ended:
            _W3C.inject(headers, self._context)
        return headers

    def end(self, *, error_type: str | None = None, end_ns: int | None = None) -> None:
        """See Span."""
        if self._ended:
            return
        if error_type is not None:
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(StatusCode.ERROR)
        self._ended = True
        self.open = False
        self._span.end(end_ns)


class SpanSource:
    """
    Where the spans of *service_name* come from, and what sends them to the collector at *endpoint*; `aclose` it.

    *sample_ratio*, from 0 to 1, is the share of new traces that is recorded.
    """

    def __init__(self, service_name: str, endpoint: str, sample_ratio: float) -> None:
        self._exporter = OTLPSpanExporter(endpoint=traces_url(endpoint))
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create({"service.name": service_name}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("tercet")

    def root(self, name: str, kind: Kind = "internal", *, headers: Mapping[str, str] | None = None) -> Span:
        """
        Return a new span: a child of the caller's that W3C Trace Context *headers* name, else the first of a trace.

        The caller's decision whether to record is followed; the ratio decides for new traces.
        """
        context = _W3C.extract(headers, Context()) if headers else Context()
        return OtlpSpan(self._tracer, self._tracer.start_span(name, context, _KINDS[kind]))

    async def aclose(self) -> None:
        """Send what is left, for FLUSH_S at most; never raises."""
        loop = asyncio.get_running_loop()
        sent = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            try:
                loop.call_soon_threadsafe(sent.set)
            except RuntimeError:  # Nobody waited that long: the loop is closed.
                return

        # Not one of the loop's threads: those are waited for at the end, and the collector may not answer.
        threading.Thread(target=shut_down, name="trace-flush", daemon=True).start()
        try:
            await asyncio.wait_for(sent.wait(), FLUSH_S)
        except TimeoutError:
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


def traces_url(endpoint: str) -> str:
    """Return where spans are posted for a collector at *endpoint*: at OTLP's own path, unless there is a path already."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH
