"""Asking: one search by body or by address, or many by body."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from services.common.app import deadline_of
from services.common.deadline import Deadline
from services.common.errors import TercetError
from services.common.http_errors import JsonRoute
from services.common.wire.base import CollectionName, QueryText
from services.common.wire.errors import ErrorBody
from services.common.wire.search import BatchAnswer, BatchReply, BatchRequest, Mode, SearchReply, SearchRequest
from services.search.batches import search_each
from services.search.routes.request import resources, search_deadline, settings_of

router = APIRouter(route_class=JsonRoute)


@router.post("/search", tags=["search"], summary="Search a collection", response_model_exclude_none=True)
async def search(request: Request, body: SearchRequest) -> SearchReply:
    """Answer a question; `degraded` and `coverage` say what the answer is worth."""
    deadline = search_deadline(request, body.timeout_ms)
    return await resources(request).pipeline.search(body, deadline, request_id=request.scope["tercet_request_id"])


@router.post("/search/batch", tags=["search"], summary="Search many times", response_model_exclude_none=True)
async def search_batch(request: Request, body: BatchRequest) -> BatchReply:
    """Answer up to 100 questions, each by itself: one that fails has an `error` where the others have an `answer`."""
    whole = deadline_of(request)
    default_ms = settings_of(request).default_timeout_ms
    request_id = request.scope["tercet_request_id"]

    def due(one: SearchRequest) -> Deadline:
        return whole.at_most((one.timeout_ms or default_ms) / 1000)

    found = await search_each(resources(request).pipeline, body.searches, due, request_id=request_id)
    return BatchReply(results=[_answer(one, request_id) for one in found])


def _answer(found: SearchReply | TercetError, request_id: str) -> BatchAnswer:
    if isinstance(found, SearchReply):
        return BatchAnswer(answer=found)
    error = ErrorBody(
        code=found.code,
        message=found.message,
        type=found.type,
        param=found.param,
        retryable=found.retryable,
        request_id=request_id,
    )
    return BatchAnswer(error=error)


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
