"""How things stand."""

from typing import Any

from fastapi import APIRouter, Request

from services.common.http_errors import JsonRoute
from services.common.wire.search import StatusReply
from services.search.routes.request import resources

router = APIRouter(route_class=JsonRoute)


@router.get("/status", tags=["status"], summary="Collections, dependencies and cache")
async def status(request: Request) -> StatusReply:
    """Say how things stand; never asks another service, so it answers when they do not."""
    found = resources(request)
    dependencies: dict[str, dict[str, Any]] = {
        name: {"state": client.breaker.state, "url": client.base_url} for name, client in found.clients.items()
    }
    collections, trouble = await found.catalog.overview()
    dependencies["ledger"] = {"state": "unavailable", "reason": trouble} if trouble else {"state": "ok"}
    return StatusReply(
        version=request.app.version,
        collections=collections,
        dependencies=dependencies,
        cache={"kind": found.cache_kind, "available": found.cache.available},
    )
