"""
Errors at the HTTP edge: the one table error → status, and the handlers that write them.

A dialect (OpenAI's, say) has statuses and a body of its own. It goes by the path's prefix, so that an error is written
in it wherever it is raised: by a route, by the router, or by middleware before either.
"""

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Scope

from services.common import errors
from services.common.wire.base import RequestModel
from services.common.wire.errors import ErrorBody, ErrorEnvelope

log = structlog.get_logger(__name__)

STATUS: dict[type[errors.TercetError], int] = {
    errors.TercetError: 500,
    errors.Malformed: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.InvalidInput: 422,
    errors.EmptyInput: 422,
    errors.ContextTooLong: 422,
    errors.NotTokenizable: 422,
    errors.TooLarge: 413,
    errors.BodyTooLarge: 413,
    errors.NotFound: 404,
    errors.NotAllowed: 405,
    errors.Conflict: 409,
    errors.Overloaded: 429,
    errors.RateLimited: 429,
    errors.Unavailable: 503,
    errors.DependencyUnavailable: 503,
    errors.NotReady: 503,
    errors.DeadlineExceeded: 504,
    errors.Internal: 500,
    errors.BackendFailed: 500,
    errors.OutOfMemory: 503,
}

DEFAULT_RETRY_AFTER_S = 1.0
MAX_NAME_CHARS = 200


class JsonRequest(Request):
    """A request whose JSON is read by orjson: strict about UTF-8, NaN and lone surrogates, and fast."""

    def take_body(self, content: bytes) -> None:
        """Let the body be *content*, which was read before."""
        self._body = content

    async def json(self) -> Any:
        """Return the parsed body; raises orjson.JSONDecodeError, a ValueError that FastAPI reports as malformed."""
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """The route class of every router: parses with `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler so that it sees a `JsonRequest`."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def _nearest(table: Mapping[type[errors.TercetError], Any], error: errors.TercetError) -> Any:
    return next((table[cls] for cls in type(error).__mro__ if cls in table), None)


def error_body(error: errors.TercetError, request_id: str | None) -> ErrorBody:
    """Return *error* as the envelope holds it."""
    return ErrorBody(
        code=error.code,
        message=error.message,
        type=error.type,
        param=error.param,
        retryable=error.retryable,
        request_id=request_id,
    )


def _native_body(error: errors.TercetError, request_id: str | None) -> dict[str, Any]:
    return ErrorEnvelope(error=error_body(error, request_id)).model_dump()


# The types that TEI has; it knows none for a key that is wrong or a route that is not there.
_TEI_TYPE: dict[type[errors.TercetError], str] = {
    errors.TercetError: "Backend",
    errors.Malformed: "Validation",
    errors.Unauthenticated: "Validation",
    errors.Forbidden: "Validation",
    errors.InvalidInput: "Validation",
    errors.EmptyInput: "Empty",
    errors.NotTokenizable: "Tokenizer",
    errors.TooLarge: "Validation",
    errors.NotFound: "Validation",
    errors.NotAllowed: "Validation",
    errors.Conflict: "Validation",
    errors.Overloaded: "Overloaded",
    errors.Unavailable: "Unhealthy",
    errors.DeadlineExceeded: "Overloaded",
    errors.OutOfMemory: "Unhealthy",
}


def _tei_body(error: errors.TercetError, _request_id: str | None) -> dict[str, Any]:
    return {"error": error.message, "error_type": _nearest(_TEI_TYPE, error)}


def _plain_body(error: errors.TercetError, _request_id: str | None) -> dict[str, Any]:
    return {"error": error.message, "code": error.code, "message": error.message}


def _reranker_body(error: errors.TercetError, request_id: str | None) -> dict[str, Any]:
    return {**_native_body(error, request_id), "message": error.message, "detail": error.message}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one API writes errors: the statuses in which it differs from STATUS, and the body, given the request's id."""

    body: Callable[[errors.TercetError, str | None], dict[str, Any]]
    status: Mapping[type[errors.TercetError], int]


DIALECTS: dict[str, Dialect] = {
    "native": Dialect(_native_body, {}),
    # OpenAI's SDK treats 422 as a fault of its own kind and expects 400 for what the caller got wrong.
    "openai": Dialect(_native_body, {errors.InvalidInput: 400, errors.TooLarge: 400}),
    "tei": Dialect(
        _tei_body,
        {
            errors.Malformed: 422,
            errors.EmptyInput: 400,
            errors.TooLarge: 422,
            errors.BodyTooLarge: 413,
            errors.Internal: 424,
            errors.OutOfMemory: 503,
        },
    ),
    # The plain services that `/api/v1` stands in for: one flat object.
    "plain": Dialect(_plain_body, {}),
    # Cohere's clients look for `message`, Jina's for `detail`, vLLM's for `error`.
    "reranker": Dialect(_reranker_body, {}),
}


class DialectTable:
    """Which dialect a path is answered in: that of the longest of *prefixes* that its segments begin with."""

    def __init__(self, prefixes: Mapping[str, str]) -> None:
        unknown = sorted(set(prefixes.values()) - set(DIALECTS))
        if unknown:
            raise ValueError(f"no such dialect: {', '.join(unknown)}")
        longest_first = sorted(prefixes.items(), key=lambda item: -len(item[0]))
        self._rows = [(prefix, f"{prefix.rstrip('/')}/", name) for prefix, name in longest_first]

    def of(self, path: str) -> str:
        """Return the dialect's name; `native` where no prefix fits."""
        for prefix, folder, name in self._rows:
            if path.startswith(folder) or path == prefix:
                return name
        return "native"


def status_of(error: errors.TercetError, dialect: str = "native") -> int:
    """Return the HTTP status for *error* in *dialect*, by its nearest class in the dialect's table, else in STATUS."""
    status: int = _nearest(DIALECTS[dialect].status, error) or _nearest(STATUS, error)
    return status


def error_response(error: errors.TercetError, *, request_id: str | None, dialect: str = "native") -> Response:
    """Return *error* as *dialect* writes it, with `Retry-After` where a retry may help."""
    headers = {}
    if error.retryable and not isinstance(error, errors.DeadlineExceeded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or DEFAULT_RETRY_AFTER_S)))
    if isinstance(error, errors.Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return Response(
        orjson.dumps(DIALECTS[dialect].body(error, request_id)),
        status_code=status_of(error, dialect),
        headers=headers,
        media_type="application/json",
    )


def respond(scope: Scope, error: errors.TercetError) -> Response:
    """Return the answer to the request of *scope*, which failed with *error*; its code is counted under that request."""
    scope["tercet_error_code"] = error.code
    return error_response(
        error, request_id=scope.get("tercet_request_id"), dialect=scope.get("tercet_dialect", "native")
    )


def malformed_json(detail: str) -> errors.Malformed:
    """Return the error for a body that is not JSON, of which the parser says *detail*."""
    return errors.Malformed(f"The body is not valid JSON: {detail}", param="body")


def from_validation(problem: RequestValidationError) -> errors.TercetError:
    """Turn FastAPI's list of validation errors into the first one that tells the caller most."""
    found: list[dict[str, Any]] = list(problem.errors())
    # A union lists the errors of every branch: the deepest is of the branch that the caller meant, and of several as
    # deep, one that is not about the type.
    nothing: dict[str, Any] = {"loc": (), "msg": "invalid request", "type": ""}
    item = max(found, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")), default=nothing)
    if item["type"] == "json_invalid":
        detail = item.get("ctx", {}).get("error", "")
        return malformed_json(detail)
    if tuple(item["loc"]) == ("body",) and item["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return errors.Malformed(
            "The body must be a JSON object, sent with the header Content-Type: application/json", param="body"
        )
    unknown = item["loc"][-1:] if item["type"] == "extra_forbidden" else ()
    parts = item["loc"][: len(item["loc"]) - len(unknown)]
    # The name of an unknown field is the caller's: it may look like a branch, and may be of any length.
    path = [str(part)[:MAX_NAME_CHARS] for part in (*_fields(parts, problem.body), *unknown)]
    if len(path) > 1 and path[0] in ("body", "query", "path", "header"):
        path = path[1:]
    # A rule about a whole object says itself which field breaks it.
    param = item.get("ctx", {}).get("param") or ".".join(path) or "body"
    message = "is not a known field" if item["type"] == "extra_forbidden" else item["msg"]
    others = len({each["loc"] for each in found}) - 1
    more = f" (and {others} more)" if others > 0 and len({str(each["loc"][:2]) for each in found}) > 1 else ""
    kind = errors.TooLarge if item["type"] == "too_long" else errors.InvalidInput
    return kind(f"{param}: {message}{more}", param=param)


def _fields(parts: Sequence[Any], body: Any) -> list[Any]:
    """Return the *parts* of pydantic's location that the caller wrote, or should have: all but a union's branches."""
    found = []
    inside: Any = {"body": body}
    for part in parts:
        if _holds(inside, part):
            inside = inside[part]
        elif _is_branch(part):
            continue
        else:
            inside = None
        found.append(part)
    return found


def _holds(inside: Any, part: Any) -> bool:
    if isinstance(part, int):
        return isinstance(inside, list) and 0 <= part < len(inside)
    return isinstance(inside, dict) and part in inside


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


def response_to(scope: Scope, error: Exception) -> Response | None:
    """Return the answer to a request that raised *error*; None for an exception that nobody foresaw."""
    if isinstance(error, RequestValidationError):
        return respond(scope, from_validation(error))
    if isinstance(error, HTTPException):
        answer = respond(scope, from_http(error))
        if error.headers and "Allow" in error.headers:
            answer.headers["allow"] = error.headers["Allow"]
        return answer
    if not isinstance(error, errors.TercetError):
        return None
    if isinstance(error, errors.Internal) and not error.retryable:
        log.error("request_failed", code=error.code, message=error.message, exc_info=error)
    return respond(scope, error)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error leave *app* in its dialect; an unforeseen one is logged by the request context."""

    async def foreseen(request: Request, error: Exception) -> Response:
        answer = response_to(request.scope, error)
        assert answer is not None
        return answer

    async def unforeseen(request: Request, _error: Exception) -> Response:
        return respond(request.scope, unforeseen_error())

    for kind in (errors.TercetError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, foreseen)
    app.add_exception_handler(Exception, unforeseen)


def unforeseen_error() -> errors.Internal:
    """Return what a caller is told of an exception that nobody foresaw: nothing of its text."""
    return errors.Internal("Something went wrong on our side; the log has it under this request id")
