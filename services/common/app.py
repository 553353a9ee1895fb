"""
The shape of every service: `create_service_app` joins settings, resources, routes, middleware and health; `serve` runs it.

A service's `build(settings, metrics)` is an async context manager that yields its frozen Resources; the lifespan enters
it, so tests pass another `build` instead of patching. Requests are refused with 503 until it has been entered.
"""

import asyncio
import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import structlog
import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common import deadline as deadlines
from services.common.auth import ALL, SERVICE_SCOPE, limits_of, open_key_ring
from services.common.breaker import Breaker
from services.common.deadline import Deadline
from services.common.direct_routes import DirectRoutes
from services.common.errors import NotReady, TercetError
from services.common.governor import Governor
from services.common.headers import header
from services.common.http_errors import DialectTable, JsonRoute, install_error_handlers
from services.common.http_protocol import OneWriteProtocol
from services.common.key_value import TIMEOUT_S, KeyValueStore
from services.common.logs import configure_logs
from services.common.metrics import Metrics
from services.common.middleware.access import AccessMiddleware
from services.common.middleware.body_limit import BodyLimitMiddleware
from services.common.middleware.disconnect import DisconnectMiddleware
from services.common.middleware.request_context import RequestContextMiddleware
from services.common.middleware.shedding import Door, SheddingMiddleware
from services.common.middleware.tracing import TracingMiddleware, open_spans
from services.common.model_errors import ModelNotFound
from services.common.retry_budget import RetryBudget
from services.common.settings import ServiceSettings, SettingsError, read_settings
from services.common.tracing import annotate, under
from services.common.wire.errors import ErrorEnvelope

log = structlog.get_logger(__name__)

STORE_FIRST_RESET_S = 0.1

S = TypeVar("S", bound=ServiceSettings)


class Resources(Protocol):
    """What a service's routes work with; it knows whether it is able to."""

    def problems(self) -> Sequence[str]:
        """Return what keeps this process from working (a dead worker, say): livez and readyz fail while there is any."""
        ...


class Service:
    """The running state of one app: its settings, metrics, and its resources once they are built."""

    def __init__(self, name: str, settings: ServiceSettings, metrics: Metrics) -> None:
        self.name = name
        self.settings = settings
        self.metrics = metrics
        self.resources: Resources | None = None
        self.draining = False
        self.start_failure: str | None = None
        self.asks_for_keys = False

    def not_ready_because(self) -> list[str]:
        """Return why requests should go elsewhere; empty when they need not."""
        if self.draining:
            return ["draining"]
        if self.resources is None:
            return ["starting"]
        return list(self.resources.problems())


def create_service_app(
    name: str,
    settings: S,
    build: Callable[[S, Metrics], AbstractAsyncContextManager[Resources]],
    routers: Sequence[APIRouter],
    *,
    description: str,
    dialects: Mapping[str, str] | None = None,
    needs: Callable[[str, str], str] | None = None,
    streams: Callable[[Scope], bool] | None = None,
    door: Door | None = None,
) -> FastAPI:
    """
    Return the ASGI app of service *name*; nothing is loaded before its lifespan starts.

    *dialects* names, for a path's prefix, the dialect of http_errors.DIALECTS in which its errors are written. *needs*
    tells an API key's scope for a method and path, if not the service's own; *streams* the requests without a body limit;
    *door* turns requests away unread.

    Raises:
        SettingsError: The file of API keys cannot be read, or traces are wanted and OpenTelemetry is not installed.
    """
    metrics = Metrics(name)
    service = Service(name, settings, metrics)
    governor = _open_governor(service)
    spans = open_spans(name, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if spans is not None:
                stack.push_async_callback(spans.aclose)
            stack.push_async_callback(governor.aclose)
            try:
                with under(spans.root("start") if spans is not None else None):
                    service.resources = await stack.enter_async_context(build(settings, metrics))
            except (TercetError, ModelNotFound) as error:
                service.start_failure = str(error)
                raise
            _keep_what_is_there()
            log.info("ready")
            try:
                yield
            finally:
                service.draining = True

    app = ServiceApp(
        title=f"Tercet {name}",
        description=description,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorEnvelope}, "5XX": {"model": ErrorEnvelope}},
    )
    app.state.service = service
    install_error_handlers(app)
    for router in (all_routers := [_health_router(), *routers]):
        app.include_router(router)
    routes = DirectRoutes(app.serve_by_framework, [route for router in all_routers for route in router.routes])
    wrapped = _wrap(routes, service, DialectTable(dialects or {}), governor, needs, streams, door)
    app.serve_http = wrapped if spans is None else TracingMiddleware(wrapped, spans)
    return app


def _keep_what_is_there() -> None:
    """Let the garbage collector pass over what there is now: a full collection would hold up all threads for some 60 ms."""
    gc.collect()
    gc.freeze()


class ServiceApp(FastAPI):
    """FastAPI's app with our layers around all of its own: what they decide costs none of its work."""

    serve_http: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http":
            scope["app"] = self
            await self.serve_http(scope, receive, send)
        else:
            await super().__call__(scope, receive, self._explaining(send))

    async def serve_by_framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request by FastAPI's routing."""
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, which asks for a key where the service does."""
        document = super().openapi()
        if self.state.service.asks_for_keys:
            schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["bearer"] = {"type": "http", "scheme": "bearer"}
            schemes["apiKey"] = {"type": "apiKey", "in": "header", "name": "api-key"}
            document["security"] = [{"bearer": []}, {"apiKey": []}]
        return document

    def _explaining(self, send: Send) -> Send:
        """Say in one line why the service could not start, where the framework would log a traceback."""

        async def explain(message: Message) -> None:
            failure = self.state.service.start_failure
            if message["type"] == "lifespan.startup.failed" and failure:
                message["message"] = f"Cannot start: {failure}"
            await send(message)

        return explain


def _wrap(
    app: ASGIApp,
    service: Service,
    dialects: DialectTable,
    governor: Governor,
    needs: Callable[[str, str], str] | None,
    streams: Callable[[Scope], bool] | None,
    door: Door | None,
) -> ASGIApp:
    """Return *app* in our middleware: the request's context outermost, then shedding, access, disconnects, the body's limit."""
    settings = service.settings
    app = BodyLimitMiddleware(app, settings.max_body_bytes, streams=streams)
    app = DisconnectMiddleware(app)
    keys, usual = open_key_ring(settings), limits_of(settings)
    service.asks_for_keys = keys is not None
    service.metrics.show_keys(key.name for key in (keys.keys if keys is not None else ()))
    if keys is not None or usual.any:
        scope_of = needs or (lambda _method, _path: SERVICE_SCOPE.get(service.name, ALL))
        app = AccessMiddleware(app, keys=keys, governor=governor, usual=usual, needs=scope_of)
    if door is not None:
        app = SheddingMiddleware(app, door)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return RequestContextMiddleware(app, service.metrics, dialects, settings.access_log, settings.slow_request_s)


def _open_governor(service: Service) -> Governor:
    url = service.settings.redis_url
    store = make_store("redis-limits", url, service.settings, service.metrics) if url else None
    return Governor(service.name, store)


def make_breaker(
    name: str,
    settings: ServiceSettings,
    metrics: Metrics,
    *,
    in_a_row: int | None = None,
    first_reset_s: float | None = None,
) -> Breaker:
    """Return a breaker for the dependency *name*, set as *settings* say, its state in the metrics for as long as it is used."""
    breaker = metrics.breakers[name] = Breaker(
        name,
        window_s=settings.breaker_window_s,
        min_calls=settings.breaker_min_calls,
        failure_ratio=settings.breaker_failure_ratio,
        reset_s=settings.breaker_reset_s,
        first_reset_s=first_reset_s,
        in_a_row=in_a_row,
        on_state=metrics.breaker_state.labels(name).set,
        on_failure=metrics.dependency_failures.labels(name).inc,
    )
    weakref.finalize(breaker, _forget_breaker, metrics, name).atexit = False
    return breaker


def _forget_breaker(metrics: Metrics, name: str) -> None:
    if metrics.breakers.get(name) is None:  # Otherwise another one for the same dependency has been made meanwhile.
        for series in (metrics.breaker_state, metrics.dependency_failures):
            with suppress(KeyError):
                series.remove(name)


def make_store(
    name: str, url: str, settings: ServiceSettings, metrics: Metrics, *, timeout_s: float = TIMEOUT_S
) -> KeyValueStore:
    """
    Return the Redis at *url*, which is left alone at its first failure: what it is for can be done without.

    It is asked again soon, and less often while it goes on failing.
    """
    breaker = make_breaker(name, settings, metrics, in_a_row=1, first_reset_s=STORE_FIRST_RESET_S)
    return KeyValueStore(url, breaker, timeout_s=timeout_s)


def make_retry_budget(name: str, metrics: Metrics) -> RetryBudget:
    """Return the budget of extra calls to the dependency *name*, counted in the metrics."""
    made, refused = (metrics.extra_calls.labels(name, outcome) for outcome in ("made", "refused"))
    return RetryBudget(on_take=lambda taken: (made if taken else refused).inc())


def service_of(request: Request) -> Service:
    """Return the service that *request* came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def resources_of(request: Request) -> Any:
    """Return the service's resources. Raises NotReady before they are built."""
    service = service_of(request)
    if service.resources is None:
        raise NotReady(f"The {service.name} service is still starting")
    return service.resources


def deadline_of(request: Request) -> Deadline:
    """Return the deadline that the caller sent, or the longest allowed. Raises Malformed for one that is no number."""
    cap_s = service_of(request).settings.max_timeout_s
    value = header(request.scope, deadlines.HEADER.encode())
    return Deadline.from_header(value.decode("latin-1"), cap_s=cap_s) if value is not None else Deadline.after(cap_s)


def caller_of(request: Request) -> str:
    """Return whose work *request* is: the API key's name where keys are asked for, else the peer's address."""
    name: str | None = request.scope.get("tercet_caller")
    if name is not None:
        return name
    client = request.scope.get("client")
    return str(client[0]) if client else ""


def charge_tokens(request: Request, tokens: int) -> None:
    """Debit the *tokens* that *request* took from its caller's allowance, if any; count them and note them. Never raises."""
    annotate({"tercet.tokens": tokens})
    key = request.scope.get("tercet_caller")
    if key is not None:
        service_of(request).metrics.key_tokens.labels(key).inc(tokens)
    charge = request.scope.get("tercet_charge")
    if charge is not None:
        charge(tokens)


def _health_router() -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["health"])

    @router.get("/livez", summary="Is this process, with its workers, worth keeping?")
    async def livez(request: Request) -> Response:
        service = service_of(request)
        problems = list(service.resources.problems()) if service.resources else []
        return JSONResponse({"status": "failed" if problems else "ok", "problems": problems}, 503 if problems else 200)

    @router.get("/readyz", summary="Should requests be sent here? Never depends on other services.")
    async def readyz(request: Request) -> Response:
        reasons = service_of(request).not_ready_because()
        return JSONResponse({"status": "not ready" if reasons else "ok", "problems": reasons}, 503 if reasons else 200)

    @router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return Response(service_of(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


class _Server(uvicorn.Server):
    """uvicorn's server that turns readiness off as soon as it is told to stop, and can say which port it got."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Start draining: not ready, finish what is under way, exit 0."""
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, then write the port file."""
        await super().startup(sockets)
        port_file = self._service.settings.port_file
        if port_file is not None and self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            temporary = port_file.with_suffix(".tmp")
            temporary.write_text(str(port))
            temporary.replace(port_file)


def serve(app: FastAPI) -> int:
    """Serve *app* until SIGTERM or SIGINT and return the exit status: 0 after a clean stop."""
    service: Service = app.state.service
    settings = service.settings
    config = uvicorn.Config(
        app,
        host=settings.listen_host,
        port=settings.listen_port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
        timeout_keep_alive=75,
        lifespan="on",
        http=OneWriteProtocol,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
    )
    server = _Server(config, service)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve())
    return 0 if server.started else 1


def _allow_all_files() -> None:
    """Raise the limit of open files as far as the process may: the usual soft limit is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_service(name: str, settings_class: type[S], create_app: Callable[[S], FastAPI]) -> None:
    """The body of every service's `__main__`: read settings, log, serve, exit."""
    try:
        settings = read_settings(settings_class, os.environ)
        configure_logs(name, level=settings.log_level, log_format=settings.log_format)
        app = create_app(settings)
    except SettingsError as error:
        sys.stderr.write(f"{name}: the settings are wrong\n{error}\n")
        raise SystemExit(2) from None
    _allow_all_files()
    # What ends a process from inside native code says where, on stderr.
    faulthandler.enable()
    # uvicorn re-raises the signal that stopped it once it is done; a clean stop has exit status 0 all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    raise SystemExit(serve(app))
