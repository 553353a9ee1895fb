"""The native HTTP routes: `/rerank`, `/models`, `/info`."""

import time
from collections.abc import Iterator

from fastapi import APIRouter, Request

from services.common.app import caller_of, charge_tokens, deadline_of, resources_of, service_of
from services.common.batching import Lane
from services.common.http_errors import JsonRoute
from services.common.wire.embedding import ModelCard, ModelList, Timings
from services.common.wire.rerank import (
    MAX_DOCUMENT_CHARS,
    MAX_DOCUMENTS,
    NativeRerankRequest,
    Passage,
    RerankInfo,
    RerankReply,
    RerankResult,
    RerankUsage,
)
from services.rerank.reranker import DocumentScore, Reranker, Scored
from services.rerank.settings import RerankSettings

STARTED_AT = int(time.time())
BULK_OVER_DOCUMENTS = 100

router = APIRouter(route_class=JsonRoute, tags=["rerank"])


def reranker_of(request: Request) -> Reranker:
    """Return the reranker that *request*'s service runs."""
    reranker = resources_of(request).reranker
    assert isinstance(reranker, Reranker)
    return reranker


def settings_of(request: Request) -> RerankSettings:
    """Return the settings of the service that *request* came to."""
    settings = service_of(request).settings
    assert isinstance(settings, RerankSettings)
    return settings


def lane_of(documents: int, *, can_wait: bool = False) -> Lane:
    """Return the lane a request travels in: long lists are bulk, so that they do not hold up short ones."""
    return Lane.BULK if can_wait or documents > BULK_OVER_DOCUMENTS else Lane.QUERY


def ranked(scored: Scored, top_n: int | None = None) -> Iterator[tuple[int, DocumentScore]]:
    """Yield the best *top_n* scored documents (None or 0: all) with their places in the request, best first."""
    for index in scored.ranking()[: top_n or None]:
        document = scored.documents[index]
        if document is not None:
            yield index, document


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
        caller=caller_of(request),
        long_documents=body.long_documents,
        priors=body.priors,
        max_document_tokens=body.max_document_tokens,
    )
    charge_tokens(request, scored.tokens)
    return RerankReply(
        results=[
            _result(index, scored.documents[index], texts[index] if body.return_documents else None)
            for index in scored.ranking()[: body.top_n]
        ],
        model=reranker.info.name,
        fingerprint=reranker.info.fingerprint,
        query_truncated=scored.query_cut,
        usage=RerankUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens, cached_tokens=scored.cached_tokens),
        timings=Timings(
            tokenization_ms=round(scored.tokenization_ms, 3),
            queue_ms=round(scored.queue_ms, 3),
            inference_ms=round(scored.inference_ms, 3),
        ),
    )


def _result(index: int, document: DocumentScore | None, text: str | None) -> RerankResult:
    if document is None:
        return RerankResult(index=index, scored=False, text=text)
    best = document.best_passage
    return RerankResult(
        index=index,
        score=document.score,
        scored=True,
        text=text,
        passages_scored=document.passages_scored,
        best_passage=None if best is None else Passage(start=best[0], end=best[1]),
        complete=document.complete,
        stage=document.stage,
    )


@router.get("/models", summary="The models served here")
async def models(request: Request) -> ModelList:
    """List the scorers by name."""
    return ModelList(data=[ModelCard(id=reranker_of(request).info.name, created=STARTED_AT)])


@router.get("/info", summary="What runs here, and what a score is made of")
async def info(request: Request) -> RerankInfo:
    """Describe the scorer, how it reads long documents, and the limits."""
    scorer = reranker_of(request).info
    settings = settings_of(request)
    return RerankInfo(
        model=scorer.name,
        kind=scorer.kind,
        score=scorer.score,
        fingerprint=scorer.fingerprint,
        max_tokens=scorer.max_tokens,
        runtime=scorer.runtime,
        precision=scorer.precision,
        labels=list(scorer.labels),
        ranks=scorer.ranks,
        long_documents=settings.long_documents,
        limits={
            "max_documents": MAX_DOCUMENTS,
            "max_document_chars": MAX_DOCUMENT_CHARS,
            "max_windows": settings.max_windows,
            "window_overlap_tokens": settings.window_overlap_tokens,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_queue_items": settings.max_queue_items,
            "tokenizer_threads": settings.tokenizer_threads,
        },
    )
