"""Work on whole collections: copies with other settings, audits, snapshots."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from services.common.app import deadline_of
from services.common.http_errors import JsonRoute
from services.common.wire.collections import (
    AuditedShard,
    AuditReply,
    ReindexReply,
    ReindexRequest,
    SnapshotReply,
)
from services.search.reindexing import CopyProgress, CopyRequest
from services.search.routes.request import Name, resources, write_deadline

router = APIRouter(route_class=JsonRoute)


@router.post("/collections/{name}/reindex", tags=["maintenance"], summary="Copy a collection", status_code=202)
async def start_reindex(request: Request, name: Name, body: ReindexRequest) -> ReindexReply:
    """Begin to copy a collection into another with other settings, or go on with that; then switch the alias."""
    asked = CopyRequest(**body.model_dump())
    return _copy(await resources(request).reindexing.start(name, asked, write_deadline(request)))


@router.get("/collections/{name}/reindex", tags=["maintenance"], summary="How a copy stands")
async def reindex_progress(request: Request, name: Name) -> ReindexReply:
    """Tell how the copy into this collection stands."""
    return _copy(resources(request).reindexing.progress(name))


@router.delete("/collections/{name}/reindex", tags=["maintenance"], summary="Stop a copy")
async def stop_reindex(request: Request, name: Name) -> ReindexReply:
    """Stop the copy into this collection; what was copied stays, and it can be started again."""
    return _copy(await resources(request).reindexing.cancel(name))


def _copy(progress: CopyProgress) -> ReindexReply:
    return ReindexReply.model_validate(progress, from_attributes=True)


@router.post("/collections/{name}/audit", tags=["maintenance"], summary="Compare shards with the ledger")
async def audit(request: Request, name: Name, repair: Annotated[bool, Query()] = False) -> AuditReply:
    """Compare the shards of every host with the ledger while they serve; with `repair` mend what differs."""
    found = resources(request)
    collection = await found.catalog.get(name)
    reports = await found.retriever.audit(collection, deadline_of(request), repair=repair)
    hosts = {
        host: [AuditedShard.model_validate(report, from_attributes=True) for report in shards]
        for host, shards in reports.items()
    }
    clean = all(not any(shard.differences.values()) for shards in hosts.values() for shard in shards)
    return AuditReply(collection=collection.name, clean=clean, hosts=hosts)


@router.post("/collections/{name}/snapshot", tags=["maintenance"], summary="Write snapshots now")
async def snapshot(request: Request, name: Name) -> SnapshotReply:
    """Let every host write a snapshot of its shards of this collection."""
    found = resources(request)
    collection = await found.catalog.get(name)
    written = await found.retriever.snapshot(collection, deadline_of(request))
    hosts = {host: {str(shard): seq for shard, seq in shards.items()} for host, shards in written.items()}
    return SnapshotReply(collection=collection.name, hosts=hosts)
