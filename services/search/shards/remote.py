"""A shard node at one address, as a host of shards: the `ShardHost` port over HTTP."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from services.common import errors
from services.common.deadline import Deadline
from services.common.tracing import span
from services.common.transport import CONNECT_TIMEOUT_S, RawReply, Transport
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

MAX_CALLS = 256  # At once: each search makes several for each shard of the node.

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
    The shards of one node, usually at one TCP address of it.

    A call that is cut off by a connection that the node had closed while it was idle is repeated once at once. Whether
    to ask a node that fails again, or another, is the router's to say.
    """

    def __init__(self, name: str, url: str, *, api_key: str | None = None, authority: str | None = None) -> None:
        """Call *url*; *authority* is the name and port that it is an address of, which TLS and proxies know it by."""
        self._name = name
        self._transport = Transport(name, url, api_key=api_key, authority=authority, max_calls=MAX_CALLS)

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
            return messages.yes_in(await self._call("wait_applied", collection, deadline, shard=shard, seq=seq))
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
        return messages.seq_in(await self._call("snapshot", collection, deadline, shard=shard))

    def notify(self, collection: Collection, seq: int) -> None:
        """Do nothing: the node hears of it from the ledger, which tells all who follow it."""

    async def forget(self, collection: Collection) -> None:
        """Tell the node to look whether the ledger has the collection still."""
        await self._call("forget", collection, Deadline.after(CONNECT_TIMEOUT_S))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def _call(self, verb: str, collection: Collection, deadline: Deadline, **asked: Any) -> Any:
        deadline.check(f"a call to {self._name}")
        content = messages.pack({"collection": messages.collection_out(collection), **asked})
        path = f"/shards/{verb}"
        async with self._transport.slots.one(deadline):
            with span(f"POST {path}", "client") as sent:
                sent.set({"http.request.method": "POST", "url.path": path, "tercet.peer": self._name})
                reply = await self._transport.send(
                    "POST", path, deadline, content=content, content_type=messages.MEDIA_TYPE
                )
        if 200 <= reply.status < 300:
            return messages.unpack_answer(reply.body, self._name)
        raise self._verdict(reply)

    def _verdict(self, reply: RawReply) -> errors.TercetError:
        try:
            said = ErrorEnvelope.model_validate_json(reply.body).error
        except ValidationError:
            return errors.DependencyUnavailable(f"{self._name}: HTTP {reply.status}")
        kind = _SAID.get(said.code, errors.DependencyUnavailable)
        return kind(f"{self._name}: {said.message}", param=said.param)
