"""
Spans as the rest of the code knows them: no tracing library is imported here, and while tracing is off nothing is done.

A request's span is made the current one by the middleware, and `span` makes a child of the current one. Where there is
none that is recorded (tracing is off, the request was not sampled, or it is over and work in the background goes
on) everything here returns at once. services/common/trace_export.py has what records and sends spans.
"""

import time
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Literal, Protocol

Kind = Literal["internal", "client", "server"]
Attributes = Mapping[str, str | int | float | bool]


class Annotated(Protocol):
    """What can be said of a span while it is under way."""

    def set(self, attributes: Attributes) -> None:
        """Add *attributes*; names follow OpenTelemetry's conventions where it has one. Texts and queries never go in."""
        ...


class Span(Annotated, Protocol):
    """One span under way."""

    @property
    def open(self) -> bool:
        """Whether it is recorded and has not ended: only then has it children."""
        ...

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    @property
    def span_id(self) -> str:
        """16 hexadecimal digits."""
        ...

    def child(self, name: str, kind: Kind = "internal", *, start_ns: int | None = None) -> "Span":
        """Return a new span under this one, begun now or at *start_ns* (nanoseconds since 1970)."""
        ...

    def rename(self, name: str) -> None:
        """Call it *name*."""
        ...

    def headers(self) -> Mapping[str, str]:
        """Return the request headers by which another service continues this trace (W3C Trace Context); none once ended."""
        ...

    def end(self, *, error_type: str | None = None, end_ns: int | None = None) -> None:
        """End it, as failed where there is an *error_type*; ending it again does nothing."""
        ...


class Timings(Protocol):
    """Where the time of work by a model went."""

    @property
    def tokenization_ms(self) -> float:
        """Time to tokenise."""
        ...

    @property
    def queue_ms(self) -> float:
        """Longest time an item waited for the model."""
        ...

    @property
    def inference_ms(self) -> float:
        """Time of the batches that held the items."""
        ...


_current: ContextVar[Span | None] = ContextVar("tercet_span", default=None)


class _Off:
    """Stands for every span that is not recorded."""

    __slots__ = ()

    def __enter__(self) -> Annotated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def set(self, attributes: Attributes) -> None:
        pass


class _Entered:
    """Makes a span the current one, and ends it."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Span) -> None:
        self._span = span
        self._token: Token[Span | None] | None = None

    def __enter__(self) -> Span:
        self._token = _current.set(self._span)
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)
        self._span.end(error_type=kind.__name__ if kind is not None else None)


_OFF = _Off()


def span(name: str, kind: Kind = "internal") -> AbstractContextManager[Annotated]:
    """Return a context manager that is a child of the current span; what is raised inside marks it as failed."""
    parent = _current.get()
    if parent is None or not parent.open:
        return _OFF
    return _Entered(parent.child(name, kind))


def under(root: Span | None) -> AbstractContextManager[Annotated]:
    """Return a context manager in which *root* is the current span, and which ends it; None is no span."""
    return _OFF if root is None else _Entered(root)


def annotate(attributes: Attributes) -> None:
    """Add *attributes* to the current span."""
    current = _current.get()
    if current is not None and current.open:
        current.set(attributes)


def record_work(done: Timings) -> None:
    """
    Add what a model just *done* with took: spans `tokenize`, `queue` and `inference` that end now, and attributes.

    Where the work took several batches the spans overlap, as some items waited while others were computed.
    """
    current = _current.get()
    if current is None or not current.open:
        return
    tokenization_ns, queue_ns, inference_ns = (
        int(ms * 1e6) for ms in (done.tokenization_ms, done.queue_ms, done.inference_ms)
    )
    end = time.time_ns()
    start = end - tokenization_ns - queue_ns - inference_ns
    queued = start + tokenization_ns
    for name, start_ns, end_ns in (
        ("tokenize", start, queued),
        ("queue", queued, queued + queue_ns),
        ("inference", end - inference_ns, end),
    ):
        current.child(name, start_ns=start_ns).end(end_ns=end_ns)
    current.set(
        {
            "tercet.tokenization_ms": round(done.tokenization_ms, 3),
            "tercet.queue_ms": round(done.queue_ms, 3),
            "tercet.inference_ms": round(done.inference_ms, 3),
        }
    )


def inject(headers: MutableMapping[str, str]) -> None:
    """Add to *headers* of a request to another service what continues the trace there, its sampling decision included."""
    current = _current.get()
    if current is not None:
        headers.update(current.headers())


def current_ids() -> tuple[str, str] | None:
    """Return the current span's (trace id, span id); None without one."""
    current = _current.get()
    return None if current is None else (current.trace_id, current.span_id)
