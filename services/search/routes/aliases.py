"""Aliases: other names of collections, which can be switched all at once."""

from fastapi import APIRouter, Request

from services.common.http_errors import JsonRoute
from services.common.wire.collections import AliasList, AliasRequest
from services.search.routes.request import Name, resources

router = APIRouter(route_class=JsonRoute)


@router.get("/aliases", tags=["aliases"], summary="List aliases")
async def list_aliases(request: Request) -> AliasList:
    """List all aliases, each with the collection that it means."""
    return AliasList(aliases=await resources(request).catalog.aliases())


@router.post("/aliases", tags=["aliases"], summary="Set aliases")
async def set_aliases(request: Request, body: AliasRequest) -> AliasList:
    """Let each alias mean a collection, or nothing for null; searches see all the changes or none."""
    return AliasList(aliases=await resources(request).catalog.set_aliases(body.changes))


@router.delete("/aliases/{name}", tags=["aliases"], summary="Remove an alias", status_code=204)
async def remove_alias(request: Request, name: Name) -> None:
    """Remove one alias; its collection stays."""
    await resources(request).catalog.set_aliases({name: None})
