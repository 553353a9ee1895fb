"""How things stand."""

from typing import Any

from fastapi import APIRouter, Request

from services.common.app import service_of
from services.common.breaker import Breaker
from services.common.http_errors import JsonRoute
from services.common.wire.status import AdmissionReply, BreakerReply, StatusReply
from services.search.routes.request import resources

router = APIRouter(route_class=JsonRoute)


@router.get("/status", tags=["status"], summary="Collections, dependencies, breakers, cache and load")
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
        cache={"kind": found.cache_kind, "available": found.cache.available, "layers": found.cache_layers()},
        breakers={name: _breaker(one) for name, one in sorted(service_of(request).metrics.breakers.items())},
        admission=AdmissionReply(
            in_flight=round(found.admission.in_flight, 3),
            limit=round(found.admission.limit, 3),
            waiting=found.admission.waiting,
            pressure=round(found.admission.pressure, 3),
        ),
    )


def _breaker(breaker: Breaker) -> BreakerReply:
    status = breaker.status
    ago_s = None if status.opened_s_ago is None else round(status.opened_s_ago, 3)
    return BreakerReply(state=status.state, opened_s_ago=ago_s, calls=status.calls, failures=status.failures)
