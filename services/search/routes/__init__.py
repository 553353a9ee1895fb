"""The HTTP routes, a file for each kind of thing: parse, call the use case, return."""

from starlette.types import Scope

from services.common.wire.keys import KeyScope
from services.search.routes import aliases, collections, documents, maintenance, search, status
from services.search.routes.request import door
from services.search.routes.streaming import STREAMS, content_type

__all__ = ["door", "is_stream", "routers", "scope_needed"]

# One by one: what is inside a router of routers cannot be served directly (see common/direct_routes.py).
routers = tuple(part.router for part in (search, collections, documents, aliases, maintenance, status))


def scope_needed(method: str, path: str) -> KeyScope:
    """
    Return what an API key needs: `search` to ask and read, `write` to write documents and create collections.

    `admin` is to delete or copy a whole collection, for aliases, audits and snapshots.
    """
    first, *rest = path.strip("/").split("/")
    if method in ("GET", "HEAD", "OPTIONS") or first not in ("collections", "aliases"):
        return "search"
    if first == "aliases" or (method == "DELETE" and len(rest) < 2):
        return "admin"
    return "admin" if len(rest) == 2 and rest[1] in ("reindex", "audit", "snapshot") else "write"


def is_stream(scope: Scope) -> bool:
    """Whether a request writes a stream of documents, whose body has no limit as a whole."""
    return scope["method"] == "POST" and scope["path"].endswith("/documents") and content_type(scope) in STREAMS
