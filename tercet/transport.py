"""Requests to one service and its answers: typed, with errors that say what to do."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Self, TypeVar

import httpx2
import orjson
from pydantic import BaseModel, ValidationError

from services.common.wire.errors import ErrorBody, ErrorEnvelope
from tercet.errors import TercetApiError, TercetClientError, TercetUnreachable

CONNECT_TIMEOUT_S = 5.0

Reply = TypeVar("Reply", bound=BaseModel)


class Transport:
    """
    The connections to the service at *base_url*; *api_key* is sent with every request, if there is one.

    Every method raises TercetApiError for an error answer and TercetUnreachable where there is none.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None, timeout_s: float, transport: httpx2.AsyncBaseTransport | None
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.key_headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        # Proxies are for the world outside; what this talks to is one's own.
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.base_url, headers=self.key_headers, transport=transport, trust_env=False
            )
        except httpx2.InvalidURL as error:
            raise TercetClientError(f"{self.base_url!r} is not an http address: {error}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _call(
        self,
        method: str,
        path: str,
        reply: type[Reply],
        *,
        body: object = None,
        params: dict[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        content = await self._send(method, path, body=body, params=params, headers=headers, timeout_s=timeout_s)
        return self._read(path, reply, content)

    def _read(self, path: str, reply: type[Reply], content: bytes | str) -> Reply:
        try:
            return reply.model_validate_json(content)
        except ValidationError:
            message = f"{self.base_url}{path} is not what Tercet answers; is this the search service's address?"
            raise TercetApiError(
                200, ErrorBody(code="unreadable_reply", message=message, type="server_error")
            ) from None

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        params: dict[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        limit_s = timeout_s or self._timeout_s
        sent = dict(headers or {}) | ({"content-type": "application/json"} if body is not None else {})
        with self._telling(limit_s):
            response = await self._http.request(
                method,
                path,
                params=params,
                content=encode(body) if body is not None else None,
                headers=sent or None,
                timeout=httpx2.Timeout(limit_s, connect=min(limit_s, CONNECT_TIMEOUT_S)),
            )
        if not response.is_success:
            raise _api_error(response)
        return response.content

    @asynccontextmanager
    async def _lines(
        self,
        method: str,
        path: str,
        *,
        content: AsyncIterator[bytes] | None = None,
        params: dict[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[AsyncIterator[str]]:
        """Send *content* as it comes, and yield the lines of the answer; only connecting has a time limit."""
        accept = {"accept": "application/x-ndjson", **(headers or {})}
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)
        with self._telling(CONNECT_TIMEOUT_S):
            async with self._http.stream(
                method, path, content=content, params=params, headers=accept, timeout=timeout
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise _api_error(response)
                yield response.aiter_lines()

    @contextmanager
    def _telling(self, limit_s: float) -> Iterator[None]:
        """Turn what the connection raises into our own errors."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise TercetUnreachable(self.base_url, "nothing listens there", refused=True) from None
        except httpx2.TimeoutException:
            raise TercetUnreachable(self.base_url, f"none within {limit_s:g} s", refused=False) from None
        except httpx2.UnsupportedProtocol as error:
            raise TercetClientError(f"{self.base_url!r} is not an http address: {error}") from None
        except httpx2.HTTPError as error:
            reason = f"the connection broke ({type(error).__name__})"
            raise TercetUnreachable(self.base_url, reason, refused=False) from None


def encode(body: object) -> bytes:
    """Return *body* as JSON. Raises TercetClientError for what has none."""
    try:
        return orjson.dumps(body, default=_plain)
    except TypeError as error:
        raise TercetClientError(f"the request cannot be written as JSON: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _api_error(response: httpx2.Response) -> TercetApiError:
    try:
        error = ErrorEnvelope.model_validate_json(response.content).error
    except ValidationError:
        retryable = response.status_code in (429, 502, 503, 504)
        message = f"{response.request.method} {response.request.url} was refused"
        error = ErrorBody(code="http_error", message=message, type="server_error", retryable=retryable)
    try:
        retry_after_s = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        retry_after_s = None
    return TercetApiError(response.status_code, error, retry_after_s=retry_after_s)
