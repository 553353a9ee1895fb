"""`POST /v1/rerank`: one superset reply that Jina, Cohere v1 and vLLM clients each read their part of."""

import uuid

from fastapi import APIRouter, Request

from services.common.app import charge_tokens, deadline_of
from services.common.http_errors import JsonRoute
from services.common.wire.rerank import (
    CompatibleDocument,
    CompatibleRerankReply,
    CompatibleRerankResult,
    RerankRequest,
    RerankUsage,
)
from services.rerank.routes import lane_of, reranker_of

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["compatible"])


@router.post("/rerank", summary="Jina-, Cohere-v1- and vLLM-compatible rerank", response_model_exclude_none=True)
async def rerank(request: Request, body: RerankRequest) -> CompatibleRerankReply:
    """Score all documents (these clients know no partial answer: a deadline that passes is 504)."""
    reranker = reranker_of(request)
    reranker.check_model(body.model)
    texts = body.texts()
    scored = await reranker.score(body.query, texts, lane=lane_of(len(texts)), deadline=deadline_of(request))
    charge_tokens(request, scored.tokens)
    results = [
        CompatibleRerankResult(
            index=index,
            relevance_score=scored.scores[index] or 0.0,
            document=CompatibleDocument(text=texts[index]) if body.return_documents else None,
        )
        for index in scored.ranking()[: body.top_n]
    ]
    return CompatibleRerankReply(
        id=uuid.uuid4().hex,
        model=reranker.info.name,
        results=results,
        usage=RerankUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens),
        meta={"api_version": {"version": "1"}, "billed_units": {"search_units": 1}},
    )
