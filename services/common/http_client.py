"""
Calls to another Tercet service: pooled connections, a breaker, the caller's deadline and request id, bounded retries.

Only idempotent calls are retried, once by default, and never past the deadline.
"""

import asyncio
import random
from typing import TypeVar

import httpx2
import orjson
import structlog
from pydantic import BaseModel, ValidationError

from services.common import deadline as deadlines
from services.common import errors
from services.common.breaker import Breaker, NotAFailure
from services.common.deadline import Deadline
from services.common.tracing import inject, span
from services.common.wire.errors import ErrorEnvelope

Reply = TypeVar("Reply", bound=BaseModel)

RETRY_PAUSE_S = 0.05
CONNECT_TIMEOUT_S = 1.0
MAX_REPLY_BYTES = 64 * 1024 * 1024
FAIR_TIME_S = (
    0.25  # A peer that was given less and was late is not to blame: one hasty caller must not open the breaker.
)
_CALLERS_FAULT: dict[int, type[errors.TercetError]] = {
    400: errors.InvalidInput,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.TooLarge,
    422: errors.InvalidInput,
    429: errors.Overloaded,
}


class _PeerRefused(NotAFailure):
    """An outcome that says nothing against the peer: the request is at fault, its queue is full, or it had no time."""

    def __init__(self, error: errors.TercetError) -> None:
        super().__init__(error.message)
        self.error = error


class ServiceClient:
    """One peer service at *base_url*, which is sent *api_key* if there is one. Close it with `aclose`."""

    def __init__(
        self,
        name: str,
        base_url: str,
        breaker: Breaker,
        *,
        api_key: str | None = None,
        max_connections: int = 64,
        retries: int = 1,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self.breaker = breaker
        self._retries = retries
        self._http = httpx2.AsyncClient(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else None,
            transport=transport,
            trust_env=False,
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    async def call(
        self,
        method: str,
        path: str,
        reply: type[Reply],
        *,
        body: BaseModel | None = None,
        deadline: Deadline,
        answer_by: Deadline | None = None,
        idempotent: bool = True,
    ) -> Reply:
        """
        Send *body* as JSON and return the parsed answer.

        The peer is told to answer by *answer_by*, else by *deadline*.

        Raises:
            DependencyUnavailable: The peer cannot be reached, fails, or its breaker is open.
            DeadlineExceeded: No answer came in time.
            InvalidInput, NotFound, Conflict, TooLarge, Overloaded: The peer's own verdict on the request.
        """
        content = orjson.dumps(body.model_dump(exclude_none=True)) if body is not None else None
        for attempt in range(1 + (self._retries if idempotent else 0)):
            deadline.check(f"a call to {self.name}")
            try:
                async with self.breaker.guard():
                    with span(f"{method} {path}", "client") as sent:
                        sent.set({"http.request.method": method, "url.path": path, "tercet.peer": self.name})
                        return await self._once(method, path, reply, content, deadline, answer_by or deadline)
            except _PeerRefused as refused:
                raise refused.error from None
            except errors.DependencyUnavailable:
                pause = RETRY_PAUSE_S * (1 + random.random())
                last = attempt == (self._retries if idempotent else 0)
                if last or self.breaker.would_refuse() or deadline.remaining_s() < 2 * pause:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the loop returns or raises")

    async def _once(
        self, method: str, path: str, reply: type[Reply], content: bytes | None, deadline: Deadline, answer_by: Deadline
    ) -> Reply:
        headers = {"content-type": "application/json"}
        remaining_s: float | None = None
        if deadline.at != float("inf"):
            remaining_s = max(0.001, deadline.remaining_s())
            headers[deadlines.HEADER] = answer_by.to_header()
        request_id = structlog.contextvars.get_contextvars().get("request_id")
        if request_id:
            headers["x-request-id"] = str(request_id)
        inject(headers)
        timeout = httpx2.Timeout(remaining_s, connect=min(remaining_s or CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S))
        try:
            # httpx's time-outs are per socket operation; a peer that drips bytes is ended by the outer one.
            async with asyncio.timeout(remaining_s):
                async with self._http.stream(
                    method, path, content=content, headers=headers, timeout=timeout
                ) as response:
                    raw = await self._read(response)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            raise self._late(f"{self.name} did not answer in time", remaining_s) from None
        except httpx2.HTTPError as error:
            raise errors.DependencyUnavailable(f"{self.name} cannot be reached: {type(error).__name__}") from None
        if response.is_success:
            try:
                return reply.model_validate(orjson.loads(raw))
            except (orjson.JSONDecodeError, ValidationError):
                raise errors.DependencyUnavailable(f"{self.name} sent an answer that cannot be read") from None
        raise self._verdict(response, raw, remaining_s)

    async def _read(self, response: httpx2.Response) -> bytes:
        chunks, size = [], 0
        async for chunk in response.aiter_bytes():
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                raise errors.DependencyUnavailable(f"{self.name} sent an answer over {MAX_REPLY_BYTES:,} bytes")
        return b"".join(chunks)

    def _late(self, message: str, given_s: float | None) -> Exception:
        late = errors.DeadlineExceeded(message)
        return _PeerRefused(late) if given_s is not None and given_s < FAIR_TIME_S else late

    def _verdict(self, response: httpx2.Response, raw: bytes, given_s: float | None) -> Exception:
        status = response.status_code
        try:
            body = ErrorEnvelope.model_validate_json(raw).error
            message, param = body.message, body.param
        except ValidationError:
            message, param = f"HTTP {status}", None
        if status == 504:
            return self._late(f"{self.name}: {message}", given_s)
        kind = _CALLERS_FAULT.get(status)
        if kind is None:
            return errors.DependencyUnavailable(f"{self.name}: {message}")
        after = response.headers.get("retry-after", "")
        retry_after_s = float(after) if after.isdigit() else None
        return _PeerRefused(kind(f"{self.name}: {message}", param=param, retry_after_s=retry_after_s))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()
