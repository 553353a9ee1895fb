"""
Errors at the HTTP edge: the one table error → status, and the handlers that write the one envelope.

A dialect (OpenAI's, say) may answer some errors with another status; its routes name it by `dialect_route`.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from services.common import errors
from services.common.wire.base import RequestModel
from services.common.wire.errors import ErrorBody, ErrorEnvelope

log = structlog.get_logger(__name__)

STATUS: dict[type[errors.TercetError], int] = {
    errors.TercetError: 500,
    errors.Malformed: 400,
    errors.InvalidInput: 422,
    errors.TooLarge: 413,
    errors.NotFound: 404,
    errors.NotAllowed: 405,
    errors.Conflict: 409,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.DependencyUnavailable: 503,
    errors.NotReady: 503,
    errors.DeadlineExceeded: 504,
    errors.Internal: 500,
    errors.BackendFailed: 500,
}

DIALECT_STATUS: dict[str, dict[int, int]] = {
    # OpenAI's SDK treats 422 as a fault of its own kind and expects 400 for what the caller got wrong.
    "openai": {422: 400, 413: 400},
}

DEFAULT_RETRY_AFTER_S = 1.0
MAX_NAME_CHARS = 200


class JsonRequest(Request):
    """A request whose JSON is read by orjson: strict about UTF-8, NaN and lone surrogates, and fast."""

    async def json(self) -> Any:
        """Return the parsed body; raises orjson.JSONDecodeError, a ValueError that FastAPI reports as malformed."""
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """The route class of every router: parses with `JsonRequest`."""

    dialect = ""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler so that it sees a `JsonRequest` that knows its dialect."""
        handler = super().get_route_handler()
        dialect = self.dialect

        async def handle(request: Request) -> Response:
            request.scope["tercet_dialect"] = dialect
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def dialect_route(name: str) -> type[JsonRoute]:
    """Return the route class for routes whose errors follow the dialect *name* of DIALECT_STATUS."""
    return type(f"{name.title()}Route", (JsonRoute,), {"dialect": name})


def status_of(error: errors.TercetError, dialect: str = "") -> int:
    """Return the HTTP status for *error*, by its nearest class in the table."""
    status = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    return DIALECT_STATUS.get(dialect, {}).get(status, status)


def error_response(error: errors.TercetError, *, request_id: str | None, dialect: str = "") -> Response:
    """Return the envelope for *error*, with `Retry-After` where a retry may help."""
    body = ErrorBody(
        code=error.code,
        message=error.message,
        type=error.type,
        param=error.param,
        retryable=error.retryable,
        request_id=request_id,
    )
    headers = {}
    if error.retryable and not isinstance(error, errors.DeadlineExceeded):
        headers["retry-after"] = str(max(1, round(error.retry_after_s or DEFAULT_RETRY_AFTER_S)))
    return Response(
        orjson.dumps(ErrorEnvelope(error=body).model_dump()),
        status_code=status_of(error, dialect),
        headers=headers,
        media_type="application/json",
    )


def from_validation(problem: RequestValidationError) -> errors.TercetError:
    """Turn FastAPI's list of validation errors into the first one that tells the caller most."""
    found: list[dict[str, Any]] = list(problem.errors())
    # A union lists the errors of every branch: the deepest is of the branch that the caller meant, and of several as
    # deep, one that is not about the type.
    nothing: dict[str, Any] = {"loc": (), "msg": "invalid request", "type": ""}
    item = max(found, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")), default=nothing)
    if item["type"] == "json_invalid":
        detail = item.get("ctx", {}).get("error", "")
        return errors.Malformed(f"The body is not valid JSON: {detail}", param="body")
    if tuple(item["loc"]) == ("body",) and item["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return errors.Malformed(
            "The body must be a JSON object, sent with the header Content-Type: application/json", param="body"
        )
    unknown = item["loc"][-1:] if item["type"] == "extra_forbidden" else ()
    parts = item["loc"][: len(item["loc"]) - len(unknown)]
    # The name of an unknown field is the caller's: it may look like a branch, and may be of any length.
    path = [str(part)[:MAX_NAME_CHARS] for part in (*(part for part in parts if not _is_branch(part)), *unknown)]
    if len(path) > 1 and path[0] in ("body", "query", "path", "header"):
        path = path[1:]
    # A rule about a whole object says itself which field breaks it.
    param = item.get("ctx", {}).get("param") or ".".join(path) or "body"
    message = "is not a known field" if item["type"] == "extra_forbidden" else item["msg"]
    others = len({each["loc"] for each in found}) - 1
    more = f" (and {others} more)" if others > 0 and len({str(each["loc"][:2]) for each in found}) > 1 else ""
    kind = errors.TooLarge if item["type"] == "too_long" else errors.InvalidInput
    return kind(f"{param}: {message}{more}", param=param)


def _is_branch(part: Any) -> bool:
    """Whether a part of pydantic's location names a union's branch rather than a field (`str`, `list[…]`, `function-…`)."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool", *(cls.__name__ for cls in RequestModel.__subclasses__()))
        or "[" in part
        or part.startswith(("function-", "constrained-"))
    )


def from_http(problem: HTTPException) -> errors.TercetError:
    """Turn the framework's own errors (no such route, wrong method, unreadable body) into the tree's."""
    if isinstance(problem.__cause__, errors.TercetError):  # Raised while the framework read the body.
        return problem.__cause__
    kinds: dict[int, type[errors.TercetError]] = {
        400: errors.Malformed,
        404: errors.NotFound,
        405: errors.NotAllowed,
        413: errors.TooLarge,
    }
    return kinds.get(problem.status_code, errors.Internal)(str(problem.detail))


def install_error_handlers(app: FastAPI) -> None:
    """Make every error leave *app* in the envelope."""

    def respond(request: Request, error: errors.TercetError) -> Response:
        request_id = request.scope.get("tercet_request_id")
        request.scope["tercet_error_code"] = error.code
        return error_response(error, request_id=request_id, dialect=request.scope.get("tercet_dialect", ""))

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, errors.TercetError)
        if isinstance(error, errors.Internal):
            log.error("request_failed", code=error.code, message=error.message, exc_info=error)
        return respond(request, error)

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(request, from_validation(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return respond(request, from_http(error))

    app.add_exception_handler(errors.TercetError, ours)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
