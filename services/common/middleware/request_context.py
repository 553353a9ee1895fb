"""The outermost layer: gives each request an id, counts and times it, logs it, and turns a stray exception into a 500."""

import re
import time
import uuid

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.errors import Internal
from services.common.http_errors import error_response
from services.common.metrics import Metrics

log = structlog.get_logger(__name__)

_ACCEPTABLE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_QUIET_PATHS = frozenset({"/livez", "/readyz", "/metrics"})


class RequestContextMiddleware:
    """Takes `X-Request-Id` if it is sane, else makes one; answers with it; labels metrics by route, never by raw path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode() if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["tercet_request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.error("unhandled_exception", exc_info=error)
            scope["tercet_error_code"] = Internal.code
            if status == 0:
                failure = Internal("Something went wrong on our side; the log has it under this request id")
                await error_response(failure, request_id=request_id)(scope, receive, send_with_id)
        finally:
            self._metrics.in_flight.dec()
            self._record(scope, status or 499, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(route, scope["method"], str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        code = scope.get("tercet_error_code")
        if code:
            self._metrics.errors.labels(code).inc()
        if scope["path"] not in _QUIET_PATHS:
            write = log.warning if status >= 500 else log.info
            write(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                code=code,
                duration_ms=round(seconds * 1000, 2),
            )
