"""
`POST /v1/rerank`, one superset reply that Jina, Cohere v1 and vLLM clients each read their part of; `POST /v2/rerank` of Cohere.

`GET /v1/models` is what vLLM's and OpenAI's clients ask. These clients know no partial answer: a deadline that passes is 504.
"""

import uuid

from fastapi import APIRouter, Request

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.http_errors import JsonRoute
from services.common.wire.embedding import ModelList
from services.common.wire.openai import OpenAIUsage
from services.common.wire.rerank_dialects import (
    CohereMeta,
    CohereRerankReply,
    CohereRerankRequest,
    CohereRerankResult,
    CohereV2RerankRequest,
    CompatibleRerankReply,
    RelevantSpan,
)
from services.rerank.reranker import DocumentScore, Scored
from services.rerank.routes import lane_of, models, ranked, reranker_of

DOCUMENTS_A_SEARCH_UNIT = 100
QUERY_CUT = "The query is longer than half of what the model reads: only its beginning was used"

router = APIRouter(route_class=JsonRoute, tags=["compatible"])


async def _score(request: Request, body: CohereRerankRequest) -> Scored:
    reranker = reranker_of(request)
    reranker.check_model(body.model)
    texts = body.texts()
    scored = await reranker.score(
        body.query,
        texts,
        lane=lane_of(len(texts), can_wait=body.can_wait),
        deadline=deadline_of(request),
        raw=body.raw,
        caller=caller_of(request),
        long_documents="first" if body.first_window_only else None,
        max_document_tokens=body.document_tokens(reranker.info.max_tokens),
    )
    charge_tokens(request, scored.tokens)
    return scored


def _results(body: CohereRerankRequest, scored: Scored) -> list[CohereRerankResult]:
    return [
        CohereRerankResult(
            index=index,
            relevance_score=document.score,
            document=body.document_of(index) if body.return_documents else None,
            relevant_spans=_spans(body, document),
        )
        for index, document in ranked(scored, body.top_n)
    ]


def _spans(body: CohereRerankRequest, document: DocumentScore) -> list[RelevantSpan] | None:
    """Return the best passage where spans were asked for and it counts as one."""
    if body.relevant_spans is None or document.best_passage is None or not body.relevant_spans.admit(document.score):
        return None
    start, end = document.best_passage
    return [RelevantSpan(start=start, end=end, score=document.score)]


def _meta(body: CohereRerankRequest, scored: Scored, version: str) -> CohereMeta:
    return CohereMeta(
        api_version={"version": version},
        billed_units={"search_units": -(-len(body.documents) // DOCUMENTS_A_SEARCH_UNIT)},
        warnings=[QUERY_CUT] if scored.query_cut else None,
    )


@router.post("/v1/rerank", summary="Jina-, Cohere-v1- and vLLM-compatible rerank", response_model_exclude_none=True)
async def rerank(request: Request, body: CohereRerankRequest) -> CompatibleRerankReply:
    """Score all documents, best first."""
    scored = await _score(request, body)
    return CompatibleRerankReply(
        id=uuid.uuid4().hex,
        model=reranker_of(request).info.name,
        results=_results(body, scored),
        usage=OpenAIUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens),
        meta=_meta(body, scored, "1"),
    )


@router.post("/v2/rerank", summary="Cohere-v2-compatible rerank", response_model_exclude_none=True)
async def rerank_v2(request: Request, body: CohereV2RerankRequest) -> CohereRerankReply:
    """Score all documents, best first."""
    scored = await _score(request, body)
    return CohereRerankReply(id=uuid.uuid4().hex, results=_results(body, scored), meta=_meta(body, scored, "2"))


@router.get("/v1/models", summary="OpenAI-compatible list of models")
async def list_models(request: Request) -> ModelList:
    """List the scorers by name."""
    return await models(request)
