"""Collections: create, list, describe, delete."""

from fastapi import APIRouter, Request

from services.common.app import deadline_of
from services.common.http_errors import JsonRoute
from services.common.wire.collections import CollectionList, CollectionReply, CollectionRequest, CollectionStats
from services.search.catalog import CollectionSettings
from services.search.routes.request import Name, resources, write_deadline

router = APIRouter(route_class=JsonRoute)


@router.post("/collections", tags=["collections"], summary="Create a collection", status_code=201)
async def create_collection(request: Request, body: CollectionRequest) -> CollectionReply:
    """Create an empty collection for a model of the embedding service, or with `dim` for the callers' own vectors."""
    catalog = resources(request).catalog
    wanted = CollectionSettings(body.model, body.dim, body.shards, body.metric, body.attributes, body.language)
    return await catalog.describe(await catalog.create(body.name, wanted, write_deadline(request)))


@router.get("/collections", tags=["collections"], summary="List collections")
async def list_collections(request: Request) -> CollectionList:
    """List all collections with their sizes."""
    return CollectionList(collections=await resources(request).catalog.describe_all())


@router.get("/collections/{name}", tags=["collections"], summary="Describe a collection")
async def describe_collection(request: Request, name: Name) -> CollectionReply:
    """Describe the collection of that name, or the one that the alias means."""
    catalog = resources(request).catalog
    return await catalog.describe(await catalog.get(name))


@router.get("/collections/{name}/stats", tags=["collections"], summary="How its shards stand")
async def collection_stats(request: Request, name: Name) -> CollectionStats:
    """Tell documents, operations, and each shard on each host."""
    catalog = resources(request).catalog
    return await catalog.stats(await catalog.get(name), deadline_of(request))


@router.delete("/collections/{name}", tags=["collections"], summary="Delete a collection", status_code=204)
async def delete_collection(request: Request, name: Name) -> None:
    """Delete a collection with all its documents and aliases."""
    await resources(request).catalog.delete(name)
