"""
The short way to a route: a table from (method, path) to the endpoint, in front of the framework's own routing.

FastAPI matches a request against one route after another, solves dependencies and keeps exit stacks; that costs more than
a short embedding. An endpoint with a fixed path that takes nothing but the request and one JSON body needs none of it.
What it answers is the same either way, and the documentation is made by FastAPI from the same declaration.
"""

import inspect
import typing
from collections.abc import Callable, Iterable
from email.message import Message as Header
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from fastapi.datastructures import DefaultPlaceholder
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.errors import Malformed
from services.common.headers import header
from services.common.http_errors import JsonRequest, JsonRoute, malformed_json, response_to

_JSON = b"application/json"

Body = TypeVar("Body", bound=BaseModel)


class DirectRoutes:
    """Serves those of *routes* that can be served directly; *app* has the others, and what matches none."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._table: dict[tuple[str, str], _Direct] = {}
        seen: list[Route] = []
        for route in routes:
            if not isinstance(route, Route):
                continue
            direct = _direct(route) if isinstance(route, JsonRoute) else None
            # The first route that fits a path has it: nothing may be moved in front of another.
            if direct is not None and not any(
                other.path_regex.match(route.path) for other in seen if "{" in other.path
            ):
                for method in (route.methods or set()) - {"HEAD"}:
                    self._table.setdefault((method, route.path), direct)
            seen.append(route)

    def __contains__(self, method_and_path: tuple[str, str]) -> bool:
        """Whether a method and path is served directly."""
        return method_and_path in self._table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        direct = self._table.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        await (self._app if direct is None else direct)(scope, receive, send)


class _Direct:
    """One endpoint, called without the framework."""

    def __init__(
        self, route: JsonRoute, request_name: str | None, body_name: str | None, body_type: type[BaseModel] | None
    ) -> None:
        self._route = route
        self._endpoint = route.endpoint
        self._request_name = request_name
        self._body_name = body_name
        self._body_type = body_type
        self._status = route.status_code or 200
        self._exclude_none = route.response_model_exclude_none

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route
        scope["endpoint"] = self._endpoint
        scope["path_params"] = {}
        try:
            arguments: dict[str, Any] = {}
            request = JsonRequest(scope, receive)
            if self._request_name is not None:
                arguments[self._request_name] = request
            if self._body_name is not None and self._body_type is not None:
                request.take_body(content := await _read(receive))
                arguments[self._body_name] = parse_body(self._body_type, content, scope)
            made = await self._endpoint(**arguments)
            response = made if isinstance(made, Response) else self._write(made)
        except Exception as error:
            answer = response_to(scope, error)
            if answer is None:
                raise
            response = answer
        await response(scope, receive, send)

    def _write(self, made: BaseModel) -> Response:
        content = made.model_dump_json(exclude_none=self._exclude_none, by_alias=True)
        return Response(content, status_code=self._status, media_type="application/json")


async def _read(receive: Receive) -> bytes:
    message = await receive()
    content: bytes = message.get("body", b"")
    chunks = [content]
    while message.get("more_body", False):
        message = await receive()
        chunks.append(message.get("body", b""))
    if message["type"] == "http.disconnect":
        raise Malformed("The request ended before its body did", param="body")
    return content if len(chunks) == 1 else b"".join(chunks)


def parse_body(body_type: type[Body], content: bytes, scope: Scope) -> Body:
    """Return what *content* says, or raise just what FastAPI would."""
    value: Any = content
    if not content:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
    if _is_json(header(scope, b"content-type") or b""):
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise malformed_json(error.msg) from None
    return validated(body_type, value)


def validated(body_type: type[Body], value: Any) -> Body:
    """Return the body whose parsed JSON is *value*, or raise just what FastAPI would."""
    try:
        return body_type.__pydantic_validator__.validate_python(value, from_attributes=True)  # type: ignore[no-any-return]
    except ValidationError as error:
        items = error.errors(include_url=False)
        found = [{**item, "loc": ("body", *item["loc"])} for item in items]
        raise RequestValidationError(found, body=value) from None


def _is_json(content_type: bytes) -> bool:
    if content_type == _JSON:
        return True
    header = Header()
    header["content-type"] = content_type.decode("latin-1")
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _direct(route: JsonRoute) -> _Direct | None:
    """Return how *route* is served directly; None where it asks for more than the request and one body."""
    plain = (
        "{" not in route.path
        and not route.dependencies
        and isinstance(route.response_class, DefaultPlaceholder)
        and not (route.response_model_include or route.response_model_exclude)
        and not (route.response_model_exclude_unset or route.response_model_exclude_defaults)
        and inspect.iscoroutinefunction(route.endpoint)
    )
    if not plain:
        return None
    hints = _hints(route.endpoint)
    answer = hints.pop("return", None)
    if not (_is_class(answer, Response) or (_is_class(answer, BaseModel) and route.response_model is answer)):
        return None
    request_name = body_name = body_type = None
    for name, parameter in inspect.signature(route.endpoint).parameters.items():
        hint = hints.get(name)
        if parameter.default is not inspect.Parameter.empty:
            return None
        if _is_class(hint, Request) and request_name is None:
            request_name = name
        elif _is_class(hint, BaseModel) and body_type is None:
            body_name, body_type = name, hint
        else:
            return None
    return _Direct(route, request_name, body_name, body_type)


def _hints(endpoint: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(endpoint, include_extras=True)
    except NameError:  # A type that only its own module's functions can name: FastAPI has its own ways.
        return {}


def _is_class(hint: Any, base: type) -> bool:
    return isinstance(hint, type) and issubclass(hint, base)
