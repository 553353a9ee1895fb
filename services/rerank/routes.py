"""The native HTTP routes: `/rerank`, `/models`, `/info`."""

import time

from fastapi import APIRouter, Request

from services.common.app import charge_tokens, deadline_of, resources_of
from services.common.batching import Lane
from services.common.http_errors import JsonRoute
from services.common.wire.embedding import ModelCard, ModelList, Timings
from services.common.wire.rerank import NativeRerankRequest, RerankInfo, RerankReply, RerankResult, RerankUsage
from services.rerank.reranker import Reranker

STARTED_AT = int(time.time())
BULK_OVER_DOCUMENTS = 100

router = APIRouter(route_class=JsonRoute, tags=["rerank"])


def reranker_of(request: Request) -> Reranker:
    """Return the reranker that *request*'s service runs."""
    reranker = resources_of(request).reranker
    assert isinstance(reranker, Reranker)
    return reranker


def lane_of(documents: int) -> Lane:
    """Return the lane a request travels in: long lists are bulk, so that they do not hold up short ones."""
    return Lane.BULK if documents > BULK_OVER_DOCUMENTS else Lane.QUERY


@router.post("/rerank", summary="Documents by relevance to a query", response_model_exclude_none=True)
async def rerank(request: Request, body: NativeRerankRequest) -> RerankReply:
    """Score documents; at the deadline (`X-Deadline-Ms`) the scored ones come back and the rest are marked."""
    reranker = reranker_of(request)
    reranker.check_model(body.model)
    texts = body.texts()
    scored = await reranker.score(
        body.query,
        texts,
        lane=lane_of(len(texts)),
        deadline=deadline_of(request),
        raw=body.raw_scores,
        allow_partial=body.allow_partial,
    )
    charge_tokens(request, scored.tokens)
    results = []
    for index in scored.ranking()[: body.top_n]:
        score = scored.scores[index]
        text = texts[index] if body.return_documents else None
        results.append(RerankResult(index=index, score=score, scored=score is not None, text=text))
    return RerankReply(
        results=results,
        model=reranker.info.name,
        fingerprint=reranker.info.fingerprint,
        usage=RerankUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens),
        timings=Timings(
            tokenization_ms=round(scored.tokenization_ms, 3),
            queue_ms=round(scored.queue_ms, 3),
            inference_ms=round(scored.inference_ms, 3),
        ),
    )


@router.get("/models", summary="The models served here")
async def models(request: Request) -> ModelList:
    """List the scorers by name."""
    return ModelList(data=[ModelCard(id=reranker_of(request).info.name, created=STARTED_AT)])


@router.get("/info", summary="What runs here, and what a score is made of")
async def info(request: Request) -> RerankInfo:
    """Describe the scorer."""
    scorer = reranker_of(request).info
    return RerankInfo(
        model=scorer.name,
        kind=scorer.kind,
        score=scorer.score,
        fingerprint=scorer.fingerprint,
        max_tokens=scorer.max_tokens,
        runtime=scorer.runtime,
        precision=scorer.precision,
    )
