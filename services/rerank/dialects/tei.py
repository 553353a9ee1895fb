"""
Text Embeddings Inference under /tei, as a server of rerankers or classifiers answers.

Behaviour read from huggingface/text-embeddings-inference, router/src/http/server.rs (2026). Here a text over the model's limit
is read in windows, unless it is to be truncated on the right: then its beginning alone is read, as there.
"""

import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Literal

import orjson
from fastapi import APIRouter, Request, Response

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.errors import ContextTooLong, EmptyInput
from services.common.http_errors import JsonRoute
from services.common.tei_http import DTYPES, add_health, cost_headers
from services.common.wire.rerank import MAX_DOCUMENTS
from services.common.wire.tei import TeiError, TruncatingRequest
from services.common.wire.tei_rerank import (
    TeiLabels,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRerankInfo,
    TeiRerankRequest,
)
from services.rerank.ports import ScorerInfo
from services.rerank.reranker import Classified, Reranker, Scored
from services.rerank.routes import lane_of, ranked, reranker_of, settings_of

router = APIRouter(
    prefix="/tei",
    route_class=JsonRoute,
    tags=["tei"],
    responses={"4XX": {"model": TeiError}, "5XX": {"model": TeiError}},
)
add_health(router)


def _long_documents(body: TruncatingRequest) -> Literal["windows", "first"] | None:
    """Return how long texts are read; with the end to be kept (`left`), all of it is, in windows."""
    if body.truncate is None:
        return None
    return "first" if body.truncate and body.direction() == "right" else "windows"


def _headers(
    reranker: Reranker, done: Scored | Classified, texts: Iterable[str | None], started: float
) -> dict[str, str]:
    return cost_headers(
        started,
        on_cpu=not any(device in reranker.info.runtime for device in ("cuda", "mps")),
        characters=sum(len(text) for text in texts if text is not None),
        tokens=done.tokens,
        tokenization_ms=done.tokenization_ms,
        queue_ms=done.queue_ms,
        inference_ms=done.inference_ms,
    )


@router.post("/rerank", summary="TEI: texts by relevance to a query", responses={200: {"model": list[TeiRank]}})
@router.post("", include_in_schema=False)
@router.post("/", include_in_schema=False)
@router.post("/invocations", include_in_schema=False)
async def rerank(request: Request, body: TeiRerankRequest) -> Response:
    """Answer with a bare array, best first. With `truncate` false a query that would be cut is an error."""
    started = time.perf_counter()
    if not body.texts:
        raise EmptyInput("`texts` cannot be empty", param="texts")
    reranker = reranker_of(request)
    scored = await reranker.score(
        body.query,
        body.texts,
        lane=lane_of(len(body.texts)),
        deadline=deadline_of(request),
        raw=bool(body.raw_scores),
        caller=caller_of(request),
        long_documents=_long_documents(body),
    )
    charge_tokens(request, scored.tokens)
    if scored.query_cut and body.truncate is False:
        raise ContextTooLong("`query` is longer than half of what the model reads, and may not be cut", param="query")
    ranks = [
        TeiRank(index=index, score=document.score, text=body.texts[index] if body.return_text else None)
        for index, document in ranked(scored)
    ]
    headers = _headers(reranker, scored, [*body.texts, *[body.query] * len(body.texts)], started)
    content = orjson.dumps([rank.model_dump(exclude_none=True) for rank in ranks])
    return Response(content, headers=headers, media_type="application/json")


@router.post(
    "/predict",
    summary="TEI: labels of texts, by a classifier",
    responses={200: {"model": list[TeiPrediction] | list[list[TeiPrediction]]}},
)
async def predict(request: Request, body: TeiPredictRequest) -> Response:
    """Answer with every label's score, best first: an array for one input, an array of arrays for a list of inputs."""
    started = time.perf_counter()
    inputs = body.sequences()
    if not inputs:
        raise EmptyInput("`inputs` cannot be empty", param="inputs")
    for index, pair in enumerate(inputs):
        if not any(pair):
            name = f"inputs.{index}" if body.is_batch else "inputs"
            raise EmptyInput(f"`{name}` cannot be empty", param=name)
    reranker = reranker_of(request)
    done = await reranker.classify(
        inputs,
        lane=lane_of(len(inputs)),
        deadline=deadline_of(request),
        raw=bool(body.raw_scores),
        caller=caller_of(request),
    )
    charge_tokens(request, done.tokens)
    rows = [[{"score": value, "label": label} for label, value in row] for row in done.rows]
    headers = _headers(reranker, done, [text for pair in inputs for text in pair], started)
    content = orjson.dumps(rows if body.is_batch else rows[0])
    return Response(content, headers=headers, media_type="application/json")


@router.get("/info", summary="TEI: the model and the limits")
async def info(request: Request) -> TeiRerankInfo:
    """Describe the model in TEI's terms."""
    scorer = reranker_of(request).info
    settings = settings_of(request)
    return TeiRerankInfo(
        model_id=scorer.name,
        model_sha=settings.model_revision,
        model_dtype=DTYPES.get(scorer.precision, scorer.precision),
        served_model_name=scorer.name,
        model_type=_model_type(scorer),
        max_concurrent_requests=settings.max_queue_items,
        max_input_length=scorer.max_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_requests=None,
        max_client_batch_size=MAX_DOCUMENTS,
        auto_truncate=True,
        tokenization_workers=settings.tokenizer_threads,
        version=version("tercet"),
    )


def _model_type(scorer: ScorerInfo) -> dict[Literal["reranker", "classifier"], TeiLabels]:
    names = scorer.labels or ("LABEL_0",)
    labels = TeiLabels(
        id2label={str(number): name for number, name in enumerate(names)},
        label2id={name: number for number, name in enumerate(names)},
    )
    return {"classifier" if len(names) > 1 else "reranker": labels}
