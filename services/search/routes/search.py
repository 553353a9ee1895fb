"""Asking: one search by body or by address."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from services.common.http_errors import JsonRoute
from services.common.wire.base import CollectionName, QueryText
from services.common.wire.search import Mode, SearchReply, SearchRequest
from services.search.routes.request import resources, search_deadline

router = APIRouter(route_class=JsonRoute)


@router.post("/search", tags=["search"], summary="Search a collection", response_model_exclude_none=True)
async def search(request: Request, body: SearchRequest) -> SearchReply:
    """Answer a question; `degraded` and `coverage` say what the answer is worth."""
    deadline = search_deadline(request, body.timeout_ms)
    return await resources(request).pipeline.search(body, deadline, request_id=request.scope["tercet_request_id"])


@router.get("/search", tags=["search"], summary="Search, for people", response_model_exclude_none=True)
async def search_by_url(
    request: Request,
    q: Annotated[QueryText, Query(description="The question, as plain words.")],
    collection: Annotated[CollectionName | None, Query()] = None,
    k: Annotated[int, Query(ge=1, le=1000)] = 10,
    mode: Annotated[Mode, Query()] = "hybrid",
    rerank: Annotated[bool, Query()] = True,
) -> SearchReply:
    """The same search with its commonest options in the address."""
    return await search(request, SearchRequest(query=q, collection=collection, k=k, mode=mode, rerank=rerank))
