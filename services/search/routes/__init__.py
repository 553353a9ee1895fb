"""The HTTP routes, a file for each kind of thing: parse, call the use case, return."""

from fastapi import APIRouter

from services.common.wire.keys import KeyScope
from services.search.routes import collections, documents, search, status

router = APIRouter()
for part in (search, collections, documents, status):
    router.include_router(part.router)


def scope_needed(method: str, path: str) -> KeyScope:
    """Return what an API key needs: `search` to ask and read, `write` to write, `admin` to delete a whole collection."""
    if method in ("GET", "HEAD", "OPTIONS") or not path.startswith("/collections"):
        return "search"
    return "admin" if method == "DELETE" and path.strip("/").count("/") < 2 else "write"
