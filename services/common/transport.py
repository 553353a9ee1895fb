"""
HTTP to a peer of ours: one transport under all calls between services.

Connections are pooled and bounded, replies are cut at a bound while they arrive, the caller's deadline holds for the
whole call, and it travels with the request id and the trace. A peer may have several addresses: the one with the
fewest calls in flight is asked, and one that fails is put aside for a while.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import structlog
from yarl import URL

from services.common import deadline as deadlines
from services.common.addresses import Addresses
from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, Overloaded
from services.common.tracing import inject

CONNECT_TIMEOUT_S = 1.0
KEEP_ALIVE_S = 60.0  # Less than the 75 s after which our services close an idle connection.
MAX_REPLY_BYTES = 64 * 1024 * 1024
FIRST_ASIDE_S = 0.2
LAST_ASIDE_S = 5.0
# A peer that was given less and was late is not to blame: one hasty caller must not have it put aside.
FAIR_TIME_S = 0.25
WAIT_SHARE = 0.25  # Of the time left, for a slot: what then still has none has its step down to take.
BULK_SHARE = 0.75  # Of the slots: the rest is for those who do not come in bulk.


@dataclass(slots=True, eq=False)
class Endpoint:
    """One address of a peer, and what it was last known to be worth."""

    url: str
    in_flight: int = 0
    failures: int = 0
    aside_until: float = 0.0
    trying: bool = False

    def well(self, now: float) -> bool:
        """Whether it may be asked: it has not failed, or it is time for one call to try it."""
        return self.failures == 0 or (self.aside_until <= now and not self.trying)

    def failed(self, now: float) -> None:
        """Put it aside, twice as long each time."""
        self.aside_until = now + min(LAST_ASIDE_S, FIRST_ASIDE_S * 2.0 ** min(self.failures, 20))
        self.failures += 1


@dataclass(frozen=True, slots=True)
class RawReply:
    """What a peer answered: *status*, *headers* (names in any case), the whole *body*, and the *endpoint* that did."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    endpoint: Endpoint = field(repr=False)


class Slots:
    """
    The bulkhead: at most *limit* calls to a peer at once, of which bulk work has a part.

    As many more may wait, for a share of their time; what comes beyond them is refused at once.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._waiting = 0
        self._all = asyncio.Semaphore(limit)
        self._bulk = asyncio.Semaphore(max(1, int(limit * BULK_SHARE)))

    @asynccontextmanager
    async def one(self, deadline: Deadline, *, bulk: bool = False) -> AsyncIterator[None]:
        """
        Hold a slot.

        Raises:
            Overloaded: All are taken, and none came free within the share of the time that may be waited.
        """
        if bulk:
            async with self._held(self._bulk, deadline), self._held(self._all, deadline):
                yield
        else:
            async with self._held(self._all, deadline, WAIT_SHARE):
                yield

    @asynccontextmanager
    async def _held(self, slots: asyncio.Semaphore, deadline: Deadline, share: float = 1.0) -> AsyncIterator[None]:
        if slots.locked():
            await self._wait(slots, deadline.remaining_s() * share)
        else:
            await slots.acquire()
        try:
            yield
        finally:
            slots.release()

    async def _wait(self, slots: asyncio.Semaphore, patience_s: float) -> None:
        full = Overloaded(f"{self._name} has {self._limit} calls under way, as many as may be", retry_after_s=1.0)
        if self._waiting >= self._limit:
            raise full
        self._waiting += 1
        try:
            async with asyncio.timeout(None if patience_s == float("inf") else max(0.0, patience_s)):
                await slots.acquire()
        except TimeoutError:
            raise full from None
        finally:
            self._waiting -= 1


class Transport:
    """
    A peer called *name* at *url*, which is sent *api_key* if there is one. Close it with `aclose`.

    *authority* is the name and port that the address in *url* belongs to, where that is known of another source.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        api_key: str | None = None,
        authority: str | None = None,
        max_calls: int = 64,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        self.name = name
        self.slots = Slots(name, max_calls)
        self._addresses = Addresses(url)
        self._max_reply_bytes = max_reply_bytes
        self._endpoints: dict[str, Endpoint] = {}
        self._resolved: tuple[str, ...] = ()
        self._session: aiohttp.ClientSession | None = None
        # Compressed replies are not asked for: between services they cost more than they save, and hide their size.
        self._headers = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "tercet"}
        authority = authority or self._addresses.authority
        if authority:
            self._headers["host"] = authority
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        tls = self._addresses.scheme == "https" and authority is not None
        self._tls_name = authority.rpartition(":")[0] if tls and authority else None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All addresses that the name has now."""
        return tuple(self._endpoints.values())

    def has_another(self) -> bool:
        """Whether, after a call that failed, there is an address that has not."""
        return any(endpoint.failures == 0 for endpoint in self._endpoints.values())

    async def send(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        *,
        content: bytes | None = None,
        content_type: str = "application/json",
        answer_by: Deadline | None = None,
        repeatable: bool = True,
    ) -> RawReply:
        """
        Send one request and return the reply, whatever its status.

        The peer is told to answer by *answer_by*, else by *deadline*. A connection that the peer had closed while it
        was idle costs nothing: a *repeatable* call is made again at once. Cancelling closes the connection.

        Raises:
            DependencyUnavailable: The peer cannot be reached, or what it sends is no HTTP reply or over the bound.
            DeadlineExceeded: No reply came in time.
        """
        given_s = deadline.remaining_s()
        endpoint = await self._choose(given_s)
        headers = self._headers_of(deadline, answer_by or deadline, content_type if content is not None else None)
        now = time.monotonic()
        trying = endpoint.failures > 0 and endpoint.aside_until <= now
        endpoint.trying = endpoint.trying or trying
        endpoint.in_flight += 1
        try:
            reply = await self._within(deadline, endpoint, method, path, content, headers, repeatable)
        except DeadlineExceeded:
            if given_s >= FAIR_TIME_S or trying:
                self._blame(endpoint)
            raise
        except DependencyUnavailable:
            self._blame(endpoint)
            raise
        finally:
            endpoint.in_flight -= 1
            if trying:
                endpoint.trying = False
        if reply.status >= 500 and reply.status != 504:
            self._blame(endpoint)
        elif endpoint.failures and reply.status < 500:
            endpoint.failures = 0
        return reply

    def distrust(self, reply: RawReply) -> None:
        """Put aside the address that sent *reply*: it said that all went well, and its body cannot be read."""
        self._blame(reply.endpoint)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._addresses.aclose()
        if self._session is not None:
            await self._session.close()

    async def _choose(self, given_s: float) -> Endpoint:
        resolved = await self._addresses.current(max(0.0, given_s))
        if resolved is not self._resolved:
            self._resolved = resolved
            known = self._endpoints
            self._endpoints = {a: known.get(a) or Endpoint(self._addresses.at(a)) for a in resolved}
        if len(resolved) == 1:
            return self._endpoints[resolved[0]]
        now = time.monotonic()
        well = [endpoint for endpoint in self._endpoints.values() if endpoint.well(now)]
        if not well:
            return min(self._endpoints.values(), key=lambda endpoint: endpoint.aside_until)
        return min(well, key=lambda endpoint: (endpoint.in_flight, random.random()))

    def _blame(self, endpoint: Endpoint) -> None:
        endpoint.failed(time.monotonic())
        self._addresses.refresh(soon=True)

    def _headers_of(self, deadline: Deadline, answer_by: Deadline, content_type: str | None) -> dict[str, str]:
        headers = dict(self._headers)
        if content_type:
            headers["content-type"] = content_type
        if deadline.at != float("inf"):
            headers[deadlines.HEADER] = answer_by.to_header()
        request_id = structlog.contextvars.get_contextvars().get("request_id")
        if request_id:
            headers["x-request-id"] = str(request_id)
        inject(headers)
        return headers

    async def _within(
        self,
        deadline: Deadline,
        endpoint: Endpoint,
        method: str,
        path: str,
        content: bytes | None,
        headers: dict[str, str],
        repeatable: bool,
    ) -> RawReply:
        remaining_s = None if deadline.at == float("inf") else max(0.001, deadline.remaining_s())
        url = URL(endpoint.url + path, encoded=True)
        noted = SimpleNamespace(reused=False)
        try:
            async with asyncio.timeout(remaining_s):
                try:
                    return await self._once(endpoint, method, url, content, headers, noted)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    if not (repeatable and noted.reused) or isinstance(error, aiohttp.ClientConnectorError):
                        raise
                return await self._once(endpoint, method, url, content, headers, noted)
        except aiohttp.ConnectionTimeoutError:
            raise DependencyUnavailable(f"{self.name} cannot be reached in time") from None
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise DependencyUnavailable(f"{self.name} cannot be reached: {type(error).__name__}") from None

    async def _once(
        self, endpoint: Endpoint, method: str, url: URL, content: bytes | None, headers: dict[str, str], noted: Any
    ) -> RawReply:
        session = self._session or self._open()
        async with session.request(
            method,
            url,
            data=content,
            headers=headers,
            allow_redirects=False,
            server_hostname=self._tls_name,
            trace_request_ctx=noted,
        ) as response:
            return RawReply(response.status, response.headers, await self._read(response), endpoint)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        bound = self._max_reply_bytes
        too_much = DependencyUnavailable(f"{self.name} sent an answer over {bound:,} bytes")
        if (response.content_length or 0) > bound:
            raise too_much
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > bound:
                raise too_much
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _open(self) -> aiohttp.ClientSession:
        watch = aiohttp.TraceConfig()
        watch.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, happy_eyeballs_delay=None),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "content-type"),
            auto_decompress=False,
            trust_env=False,
            trace_configs=[watch],
        )
        return self._session


async def _note_reuse(_session: aiohttp.ClientSession, context: SimpleNamespace, _parameters: Any) -> None:
    context.trace_request_ctx.reused = True
