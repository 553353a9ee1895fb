"""A shard node at one address, as a host of shards: the `ShardHost` port over HTTP."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx2
import structlog
from pydantic import ValidationError

from services.common import deadline as deadlines
from services.common import errors
from services.common.deadline import Deadline
from services.common.tracing import inject, span
from services.common.wire.errors import ErrorEnvelope
from services.search.ports import (
    AuditReport,
    Collection,
    LexicalStatistics,
    Match,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards import messages

CONNECT_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 64

# Errors that the node's own answer stands for; whatever else it says, it could not answer.
_SAID: dict[str, type[errors.TercetError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidInput,
        errors.NotFound,
        errors.Conflict,
        errors.NotReady,
        errors.DeadlineExceeded,
        errors.BackendFailed,
    )
}


class RemoteHost:
    """
    The shards of one node, one TCP address of it.

    A call that is cut off by a connection that the node had closed while it was idle is repeated once at once. Whether
    to ask a node that fails again, or another, is the router's to say.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        api_key: str | None = None,
        host_header: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Call *url*; *host_header* is the name that it is an address of, which TLS and proxies know it by."""
        headers = {"content-type": messages.MEDIA_TYPE}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        if host_header:
            headers["host"] = host_header
        self._name = name
        self._extensions: dict[str, Any] = {"sni_hostname": host_header.rpartition(":")[0]} if host_header else {}
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            transport=transport,
            trust_env=False,
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS),
        )

    @property
    def name(self) -> str:
        """How failures, metrics and logs call it."""
        return self._name

    async def statistics(
        self, collection: Collection, shard: int, terms: Sequence[str], deadline: Deadline
    ) -> LexicalStatistics:
        """See ShardHost."""
        return messages.statistics_in(
            await self._call("statistics", collection, deadline, shard=shard, terms=list(terms))
        )

    async def search(self, collection: Collection, shard: int, query: ShardQuery, deadline: Deadline) -> ShardAnswer:
        """See ShardHost."""
        asked = messages.query_out(query)
        return messages.answer_in(await self._call("search", collection, deadline, shard=shard, query=asked))

    async def fetch(
        self, collection: Collection, shard: int, ids: Sequence[str], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        """See ShardHost."""
        found = await self._call("fetch", collection, deadline, shard=shard, ids=list(ids), vectors=vectors)
        return messages.documents_in(found)

    async def matching(
        self, collection: Collection, shard: int, filter: Any, deadline: Deadline, *, limit: int
    ) -> list[Match]:
        """See ShardHost."""
        asked = messages.filter_out(filter)
        found = await self._call("matching", collection, deadline, shard=shard, filter=asked, limit=limit)
        return messages.matches_in(found)

    async def wait_applied(self, collection: Collection, shard: int, seq: int, deadline: Deadline) -> bool:
        """See ShardHost."""
        try:
            return bool(await self._call("wait_applied", collection, deadline, shard=shard, seq=seq))
        except errors.DeadlineExceeded:
            return False

    async def standings(self, collection: Collection, deadline: Deadline) -> list[ShardStanding]:
        """See ShardHost."""
        return messages.standings_in(await self._call("standings", collection, deadline))

    async def audit(self, collection: Collection, shard: int, deadline: Deadline, *, repair: bool) -> AuditReport:
        """See ShardHost."""
        return messages.report_in(await self._call("audit", collection, deadline, shard=shard, repair=repair))

    async def snapshot(self, collection: Collection, shard: int, deadline: Deadline) -> int:
        """See ShardHost."""
        return int(await self._call("snapshot", collection, deadline, shard=shard))

    def notify(self, collection: Collection, seq: int) -> None:
        """Do nothing: the node hears of it from the ledger, which tells all who follow it."""

    async def forget(self, collection: Collection) -> None:
        """Tell the node to look whether the ledger has the collection still."""
        await self._call("forget", collection, Deadline.after(CONNECT_TIMEOUT_S))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _call(self, verb: str, collection: Collection, deadline: Deadline, **asked: Any) -> Any:
        deadline.check(f"a call to {self._name}")
        content = messages.pack({"collection": messages.collection_out(collection), **asked})
        with span(f"POST /shards/{verb}", "client") as sent:
            sent.set({"http.request.method": "POST", "url.path": f"/shards/{verb}", "tercet.peer": self._name})
            remaining_s = None if deadline.at == float("inf") else max(0.001, deadline.remaining_s())
            try:
                async with asyncio.timeout(remaining_s):
                    response = await self._send(verb, content, deadline, remaining_s)
            except (TimeoutError, httpx2.TimeoutException):
                if deadline.passed:
                    raise errors.DeadlineExceeded(f"{self._name} did not answer in time") from None
                raise errors.DependencyUnavailable(f"{self._name} cannot be reached in time") from None
            except httpx2.HTTPError as error:
                raise errors.DependencyUnavailable(f"{self._name} cannot be reached: {type(error).__name__}") from None
        if response.is_success:
            return messages.unpack_answer(response.content, self._name)
        raise self._verdict(response)

    async def _send(self, verb: str, content: bytes, deadline: Deadline, remaining_s: float | None) -> httpx2.Response:
        headers: dict[str, str] = {}
        if remaining_s is not None:
            headers[deadlines.HEADER] = deadline.to_header()
        request_id = structlog.contextvars.get_contextvars().get("request_id")
        if request_id:
            headers["x-request-id"] = str(request_id)
        inject(headers)
        timeout = httpx2.Timeout(remaining_s, connect=min(remaining_s or CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S))
        for attempt in (1, 2):
            try:
                return await self._http.post(
                    f"/shards/{verb}", content=content, headers=headers, timeout=timeout, extensions=self._extensions
                )
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                if attempt == 2:
                    raise
        raise AssertionError("unreachable: the loop returns or raises")

    def _verdict(self, response: httpx2.Response) -> errors.TercetError:
        try:
            said = ErrorEnvelope.model_validate_json(response.content).error
        except ValidationError:
            return errors.DependencyUnavailable(f"{self._name}: HTTP {response.status_code}")
        kind = _SAID.get(said.code, errors.DependencyUnavailable)
        return kind(f"{self._name}: {said.message}", param=said.param)
