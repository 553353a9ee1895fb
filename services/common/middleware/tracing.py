"""A span for each request, with the caller's trace continued. It is outermost, so that what others log bears the trace's id."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.headers import header
from services.common.middleware.request_context import QUIET_PATHS
from services.common.settings import ServiceSettings, SettingsError
from services.common.tracing import Attributes, Kind, Span, under

if TYPE_CHECKING:
    from services.common.trace_export import SpanSource

CLIENT_GONE = 499  # As the metrics have it.


def open_spans(service: str, settings: ServiceSettings) -> "SpanSource | None":
    """
    Return where *service*'s spans come from; None, and no tracing library is loaded, when *settings* name no collector.

    Raises:
        SettingsError: A collector is named, and OpenTelemetry is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from services.common.trace_export import SpanSource
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("opentelemetry"):
            raise
        prefix: Any = settings.model_config.get("env_prefix", "")
        raise SettingsError(
            f"{prefix}OTLP_ENDPOINT: traces need OpenTelemetry, which is not installed: pip install 'tercet[otel]'"
        ) from None
    name = settings.otlp_service_name or f"tercet-{service}"
    return SpanSource(name, settings.otlp_endpoint, settings.trace_sample_ratio)


class Roots(Protocol):
    """Where a request's span comes from."""

    def root(self, name: str, kind: Kind = "internal", *, headers: Mapping[str, str] | None = None) -> Span:
        """Return a new span that continues the trace that *headers* name, if they name one."""
        ...


class TracingMiddleware:
    """Spans of kind `server`, named by method and route; health and metrics have none."""

    def __init__(self, app: ASGIApp, roots: Roots) -> None:
        self._app = app
        self._roots = roots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        root = self._roots.root(scope["method"], "server", headers=_trace_headers(scope))
        if not root.open:
            with under(root):
                await self._app(scope, receive, send)
            return
        status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with under(root):
            try:
                await self._app(scope, receive, send_seen)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    root.rename(f"{scope['method']} {route}")
                root.set(_attributes(scope, route, status or CLIENT_GONE))
                if status >= 500:
                    root.end(error_type=scope.get("tercet_error_code") or str(status))


def _trace_headers(scope: Scope) -> dict[str, str]:
    parent = header(scope, b"traceparent")
    if parent is None:
        return {}
    state = header(scope, b"tracestate")
    return {"traceparent": parent.decode("latin-1")} | (
        {} if state is None else {"tracestate": state.decode("latin-1")}
    )


def _attributes(scope: Scope, route: str | None, status: int) -> Attributes:
    known = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": status,
        "tercet.request_id": scope.get("tercet_request_id"),
        "tercet.error_code": scope.get("tercet_error_code"),
        "tercet.caller": scope.get("tercet_caller"),
    }
    return {name: value for name, value in known.items() if value is not None}
