"""vLLM's `POST /score` and `POST /v1/score`: scores of pairs, in the order given."""

import asyncio
import time
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any

from fastapi import APIRouter, Request

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.http_errors import JsonRoute
from services.common.wire.openai import OpenAIUsage
from services.common.wire.rerank_dialects import ScoreItem, ScoreReply, ScoreRequest
from services.rerank.reranker import Scored
from services.rerank.routes import lane_of, ranked, reranker_of

router = APIRouter(route_class=JsonRoute, tags=["compatible"])


@router.post("/score", summary="vLLM-compatible scores of pairs")
@router.post("/v1/score", include_in_schema=False)
async def score(request: Request, body: ScoreRequest) -> ScoreReply:
    """Score one query with each document, or as many queries as documents, one with one; a deadline that passes is 504."""
    reranker = reranker_of(request)
    reranker.check_model(body.model)
    pairs = body.pairs()
    by_query: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(pairs):
        by_query.setdefault(query, []).append(index)
    lane, deadline, caller = lane_of(len(pairs), can_wait=body.can_wait), deadline_of(request), caller_of(request)
    scored = await _all_or_none(
        reranker.score(
            query,
            [pairs[index][1] for index in indices],
            lane=lane,
            deadline=deadline,
            raw=body.raw,
            caller=caller,
            long_documents="first" if body.first_window_only else None,
            max_document_tokens=body.document_tokens(reranker.info.max_tokens),
        )
        for query, indices in by_query.items()
    )
    tokens = sum(one.tokens for one in scored)
    charge_tokens(request, tokens)
    scores = {
        indices[place]: document.score
        for indices, one in zip(by_query.values(), scored, strict=True)
        for place, document in ranked(one)
    }
    return ScoreReply(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=reranker.info.name,
        data=[ScoreItem(index=index, score=scores[index]) for index in range(len(pairs))],
        usage=OpenAIUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


async def _all_or_none(work: Iterable[Coroutine[Any, Any, Scored]]) -> list[Scored]:
    """Return what each of *work* came to, in order; the first that fails cancels the others, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
