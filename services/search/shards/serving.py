"""
The routes of a shard node: one for each method of the `ShardHost` port, which `RemoteHost` calls.

They are internal: bodies are MessagePack (see messages.py) and may change with any version.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from services.common.app import deadline_of, resources_of
from services.common.deadline import Deadline
from services.common.errors import Malformed
from services.common.http_errors import JsonRoute
from services.search.ports import Collection
from services.search.shards import messages
from services.search.shards.host import LocalHost
from services.search.shards.messages import Map

Serve = Callable[[LocalHost, Collection, Map, Deadline], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What a shard node's routes work with."""

    host: LocalHost

    def problems(self) -> Sequence[str]:
        """Nothing in this process can die alone: shards that are catching up are able to answer."""
        return []


def node_routes() -> APIRouter:
    """Return the routes of a node, whose app has NodeResources."""
    router = APIRouter(route_class=JsonRoute)
    for name, serve in SERVED.items():
        router.add_api_route(f"/shards/{name}", _endpoint(serve), methods=["POST"], include_in_schema=False, name=name)
    return router


def _endpoint(serve: Serve) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        asked = messages.unpack_request(await request.body())
        resources = resources_of(request)
        assert isinstance(resources, NodeResources)
        try:
            collection = messages.collection_in(asked["collection"])
            answer = await serve(resources.host, collection, asked, deadline_of(request))
        except KeyError as error:
            raise Malformed(f"{error.args[0]}: is missing", param=str(error.args[0])) from None
        return Response(messages.pack(answer), media_type=messages.MEDIA_TYPE)

    return endpoint


async def _statistics(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    return messages.statistics_out(await host.statistics(collection, asked["shard"], asked["terms"], deadline))


async def _search(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    query = messages.query_in(asked["query"], collection)
    return messages.answer_out(await host.search(collection, asked["shard"], query, deadline))


async def _fetch(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    found = await host.fetch(collection, asked["shard"], asked["ids"], deadline, vectors=asked["vectors"])
    return messages.documents_out(found)


async def _matching(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    filter = messages.filter_in(asked["filter"], collection)
    found = await host.matching(collection, asked["shard"], filter, deadline, limit=asked["limit"])
    return messages.matches_out(found)


async def _wait_applied(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    return await host.wait_applied(collection, asked["shard"], asked["seq"], deadline)


async def _standings(host: LocalHost, collection: Collection, _asked: Map, deadline: Deadline) -> object:
    return messages.standings_out(await host.standings(collection, deadline))


async def _audit(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    return messages.report_out(await host.audit(collection, asked["shard"], deadline, repair=asked["repair"]))


async def _snapshot(host: LocalHost, collection: Collection, asked: Map, deadline: Deadline) -> object:
    return await host.snapshot(collection, asked["shard"], deadline)


async def _forget(host: LocalHost, collection: Collection, _asked: Map, _deadline: Deadline) -> object:
    await host.forget_if_deleted(collection)
    return None


SERVED: dict[str, Serve] = {
    "statistics": _statistics,
    "search": _search,
    "fetch": _fetch,
    "matching": _matching,
    "wait_applied": _wait_applied,
    "standings": _standings,
    "audit": _audit,
    "snapshot": _snapshot,
    "forget": _forget,
}
