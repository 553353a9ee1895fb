"""Asking: one search by body or by address, or many by body, as a list or a line each."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.common.errors import TercetError
from services.common.http_errors import JsonRoute, error_body, unforeseen_error
from services.common.wire.base import CollectionName, QueryText
from services.common.wire.documents import NDJSON
from services.common.wire.msearch import SearchLine
from services.common.wire.search import BatchReply, BatchRequest, Mode, SearchReply, SearchRequest
from services.search.answer import Answer
from services.search.batches import Caller, Outcome
from services.search.routes.request import SEARCH_HEADERS, priority_of, resources, search_deadlines
from services.search.routes.streaming import read_searches

router = APIRouter(route_class=JsonRoute, tags=["search"])


class LinesResponse(StreamingResponse):
    """NDJSON, sent as it is made."""

    media_type = NDJSON


_LINES: dict[str, Any] = {
    **SEARCH_HEADERS,
    "requestBody": {
        "required": True,
        "content": {
            NDJSON: {
                "schema": {"type": "string", "description": "A search a line, as `POST /search` takes it."},
                "example": '{"query": "how do tides work", "k": 100}\n{"query": "bread at home", "mode": "lexical"}\n',
            }
        },
    },
}


@router.post(
    "/search",
    summary="Search a collection",
    response_model=SearchReply,
    response_model_exclude_none=True,
    openapi_extra=SEARCH_HEADERS,
)
async def search(request: Request, body: SearchRequest) -> Response:
    """Answer a question; `degraded` and `coverage` say what the answer is worth."""
    answer = await resources(request).pipeline.answer(
        body,
        search_deadlines(request)(body.timeout_ms),
        request_id=request.scope["tercet_request_id"],
        priority=priority_of(request),
        tenant=_tenant(request),
    )
    return Response(answer.body(), media_type="application/json")


@router.post(
    "/search/batch",
    summary="Search many times",
    response_model=BatchReply,
    response_model_exclude_none=True,
    openapi_extra=SEARCH_HEADERS,
)
async def search_batch(request: Request, body: BatchRequest) -> Response:
    """Answer up to 100 questions, each by itself: one that fails has an `error` where the others have an `answer`."""
    outcomes = await resources(request).batches.each(body.searches, _caller(request))
    written = (b"{" + _member(outcome, request.scope["tercet_request_id"]) + b"}" for outcome in outcomes)
    return Response(b'{"results":[' + b",".join(written) + b"]}", media_type="application/json")


@router.post(
    "/msearch",
    summary="Search many times, a line each",
    response_class=LinesResponse,
    response_model=SearchLine,
    response_description="A line for each of the body's, in their order.",
    openapi_extra=_LINES,
)
async def search_lines(request: Request) -> Response:
    """
    Answer any number of questions, for evaluation runs: a line each in, a line each out, in the same order.

    A line that cannot be answered has an `error`. Answers are sent as they are made, and no faster than they are read.
    """
    found = resources(request).batches.stream(read_searches(await request.body()), _caller(request))
    return LinesResponse(_lines(found, request.scope["tercet_request_id"]))


@router.get(
    "/search",
    summary="Search, for people",
    response_model=SearchReply,
    response_model_exclude_none=True,
    openapi_extra=SEARCH_HEADERS,
)
async def search_by_url(
    request: Request,
    q: Annotated[QueryText, Query(description="The question, as plain words.")],
    collection: Annotated[CollectionName | None, Query()] = None,
    k: Annotated[int, Query(ge=1, le=1000)] = 10,
    mode: Annotated[Mode, Query()] = "hybrid",
    rerank: Annotated[bool, Query()] = True,
) -> Response:
    """The same search with its commonest options in the address."""
    return await search(request, SearchRequest(query=q, collection=collection, k=k, mode=mode, rerank=rerank))


def _tenant(request: Request) -> str:
    """Return the API key's name, where keys are asked for."""
    return request.scope.get("tercet_caller") or ""


def _caller(request: Request) -> Caller:
    due = search_deadlines(request)
    return Caller(
        due=lambda one: due(one.timeout_ms),
        request_id=request.scope["tercet_request_id"],
        priority=priority_of(request),
        tenant=_tenant(request),
    )


def _member(outcome: Outcome, request_id: str) -> bytes:
    """Return an outcome as a member of a JSON object."""
    if isinstance(outcome, Answer):
        return b'"answer":' + outcome.body()
    error = outcome if isinstance(outcome, TercetError) else unforeseen_error()
    return b'"error":' + error_body(error, request_id).model_dump_json(exclude_none=True).encode()


async def _lines(outcomes: AsyncIterator[Outcome], request_id: str) -> AsyncIterator[bytes]:
    index = 0
    async for outcome in outcomes:
        yield b'{"index":%d,%s}\n' % (index, _member(outcome, request_id))
        index += 1
