"""Collections: create, list, describe, delete."""

from fastapi import APIRouter, Request

from services.common.http_errors import JsonRoute
from services.common.wire.collections import CollectionList, CollectionReply, CollectionRequest
from services.search.routes.request import Name, resources, write_deadline

router = APIRouter(route_class=JsonRoute)


@router.post("/collections", tags=["collections"], summary="Create a collection", status_code=201)
async def create_collection(request: Request, body: CollectionRequest) -> CollectionReply:
    """Create an empty collection for the embedding service's model (or, with `dim`, for the callers' own vectors)."""
    catalog = resources(request).catalog
    made = await catalog.create(body.name, write_deadline(request), shards=body.shards, dim=body.dim)
    return await catalog.describe(made)


@router.get("/collections", tags=["collections"], summary="List collections")
async def list_collections(request: Request) -> CollectionList:
    """List all collections with their sizes."""
    return CollectionList(collections=await resources(request).catalog.describe_all())


@router.get("/collections/{name}", tags=["collections"], summary="Describe a collection")
async def describe_collection(request: Request, name: Name) -> CollectionReply:
    """Describe one collection."""
    catalog = resources(request).catalog
    return await catalog.describe(await catalog.get(name))


@router.delete("/collections/{name}", tags=["collections"], summary="Delete a collection", status_code=204)
async def delete_collection(request: Request, name: Name) -> None:
    """Delete a collection with all its documents."""
    await resources(request).catalog.delete(name)
