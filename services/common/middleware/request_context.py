"""The outermost layer: gives each request an id, counts and times it, logs it, and turns a stray exception into a 500."""

import random
import re
import time
from typing import Literal

import structlog
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.headers import header
from services.common.http_errors import DialectTable, respond, unforeseen_error
from services.common.metrics import Metrics

log = structlog.get_logger(__name__)

_ACCEPTABLE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET_PATHS = frozenset(
    {"/livez", "/readyz", "/metrics", "/tei/health", "/tei/ping"}
)  # Asked all the time by machines: not worth a log line or a span.


class RequestContextMiddleware:
    """
    Takes `X-Request-Id` if it is sane, else makes one; answers with it; labels metrics by route, never by raw path.

    It logs `errors` (5xx answers), `slow` requests too (over *slow_s* seconds), or `all`.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        dialects: DialectTable | None = None,
        access_log: Literal["all", "slow", "errors"] = "all",
        slow_s: float = 1.0,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._dialects = dialects or DialectTable({})
        self._log_over_s = {"all": 0.0, "slow": slow_s, "errors": float("inf")}[access_log]
        self._counters: dict[tuple[str, str, int], Counter] = {}
        self._timers: dict[str, Histogram] = {}
        self._in_flight = 0
        metrics.in_flight.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        if given is not None and _ACCEPTABLE_ID.fullmatch(given):
            id_header, request_id = given, given.decode()
        else:
            request_id = f"{random.getrandbits(128):032x}"
            id_header = request_id.encode()
        scope["tercet_request_id"] = request_id
        scope["tercet_dialect"] = self._dialects.of(scope["path"])
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_header)]
            await send(message)

        started = time.perf_counter()
        self._in_flight += 1
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.error("unhandled_exception", exc_info=error)
            answer = respond(scope, unforeseen_error())
            if status == 0:
                await answer(scope, receive, send_with_id)
        finally:
            self._in_flight -= 1
            self._record(scope, status or 499, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route: str = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        counter = self._counters.get((route, method, status))
        if counter is None:
            counter = self._counters[route, method, status] = self._metrics.requests.labels(route, method, str(status))
        counter.inc()
        timer = self._timers.get(route)
        if timer is None:
            timer = self._timers[route] = self._metrics.request_seconds.labels(route)
        timer.observe(seconds)
        caller: str | None = scope.get("tercet_caller")
        if caller is not None:
            self._metrics.key_requests.labels(caller).inc()
        code = scope.get("tercet_error_code")
        if code:
            self._metrics.errors.labels(code).inc()
        failed = status >= 500
        if (failed or seconds >= self._log_over_s) and scope["path"] not in QUIET_PATHS:
            write = log.warning if failed else log.info
            write(
                "request",
                method=method,
                route=route,
                status=status,
                code=code,
                caller=caller,
                duration_ms=round(seconds * 1000, 2),
            )
