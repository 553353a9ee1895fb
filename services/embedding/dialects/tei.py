"""
Text Embeddings Inference under /tei: a TEI client changes its base URL and nothing else.

Behaviour read from huggingface/text-embeddings-inference, router/src/http/server.rs (2026). A TEI serves one model, so
the default model answers here. Where its OpenAPI text and its code disagree, this follows the code: too large a batch
is 422, not 413.
"""

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from services.common.app import caller_of, charge_tokens, deadline_of
from services.common.errors import EmptyInput
from services.common.http_errors import JsonRoute
from services.common.tei_http import DTYPES, add_health, cost_headers
from services.common.tokens import TokenPiece
from services.common.wire.openai import OpenAIEmbeddingReply
from services.common.wire.tei import (
    TeiDecodeRequest,
    TeiEmbedAllRequest,
    TeiEmbedRequest,
    TeiError,
    TeiInfo,
    TeiModelType,
    TeiOpenAIRequest,
    TeiPooling,
    TeiSimilarityRequest,
    TeiToken,
    TeiTokenizeRequest,
    TruncatingRequest,
)
from services.embedding.dialects.limits import check_inputs, truncate_of
from services.embedding.dialects.openai import embed_openai
from services.embedding.embedder import Embedder, Embeddings, EmbedOptions, TokenEmbeddings
from services.embedding.outputs import json_response
from services.embedding.ports import ModelInfo
from services.embedding.resources import embedding_of, models_of
from services.embedding.routes import lane_of

POOLINGS = {"lasttoken": "last_token"}

router = APIRouter(
    prefix="/tei",
    route_class=JsonRoute,
    tags=["tei"],
    responses={"4XX": {"model": TeiError}, "5XX": {"model": TeiError}},
)


def _options(
    request: Request, asked: TruncatingRequest, *, normalize: bool = True, dimensions: int | None = None
) -> EmbedOptions:
    return EmbedOptions(
        prompt_name=asked.prompt_name,
        normalize=normalize,
        truncate=truncate_of(request, asked.truncate),
        truncation_direction=asked.direction(),
        dimensions=dimensions,
    )


def _headers(embedder: Embedder, made: Embeddings | TokenEmbeddings, started: float) -> dict[str, str]:
    return cost_headers(
        started,
        on_cpu=embedder.info.device == "cpu",
        characters=made.characters,
        tokens=sum(made.tokens),
        tokenization_ms=made.tokenization_ms,
        queue_ms=made.queue_ms,
        inference_ms=made.inference_ms,
    )


@router.post("/embed", summary="TEI: inputs to vectors", responses={200: {"model": list[list[float]]}})
@router.post("", include_in_schema=False)
@router.post("/", include_in_schema=False)
@router.post("/invocations", include_in_schema=False)
async def embed(request: Request, body: TeiEmbedRequest) -> Response:
    """Answer with a bare array: one vector an input, in order."""
    started = time.perf_counter()
    inputs = body.input_list()
    check_inputs(request, inputs, "inputs")
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        made = await embedder.embed(
            inputs,
            _options(request, body, normalize=body.normalize, dimensions=body.dimensions),
            lane=lane_of(len(inputs)),
            deadline=deadline_of(request),
            caller=caller_of(request),
        )
        charge_tokens(request, sum(made.tokens))
        headers = _headers(embedder, made, started)
        return await json_response(list(made.vectors), floats=made.vectors.size, headers=headers)


@router.post(
    "/embed_all", summary="TEI: inputs to one vector a token", responses={200: {"model": list[list[list[float]]]}}
)
async def embed_all(request: Request, body: TeiEmbedAllRequest) -> Response:
    """Answer with a bare array: for each input, its tokens' vectors, special tokens included."""
    started = time.perf_counter()
    inputs = body.input_list()
    check_inputs(request, inputs, "inputs")
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        made = await embedder.embed_tokens(
            inputs,
            _options(request, body),
            lane=lane_of(len(inputs)),
            deadline=deadline_of(request),
            caller=caller_of(request),
        )
        charge_tokens(request, sum(made.tokens))
        headers = _headers(embedder, made, started)
        return await json_response(made.vectors, floats=sum(rows.size for rows in made.vectors), headers=headers)


@router.post("/similarity", summary="TEI: cosine of one sentence with others", responses={200: {"model": list[float]}})
async def similarity(request: Request, body: TeiSimilarityRequest) -> Response:
    """Answer with a bare array: the source sentence's cosine with each of the others, in order."""
    started = time.perf_counter()
    sentences = body.inputs.sentences
    check_inputs(request, sentences, "inputs.sentences", more=1)
    if not body.inputs.source_sentence:
        raise EmptyInput("`inputs.source_sentence` cannot be empty", param="inputs.source_sentence")
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        made = await embedder.embed(
            [body.inputs.source_sentence, *sentences],
            _options(request, body.parameters or TruncatingRequest()),
            lane=lane_of(len(sentences)),
            deadline=deadline_of(request),
            caller=caller_of(request),
        )
        charge_tokens(request, sum(made.tokens))
        cosines = np.clip(made.vectors[1:] @ made.vectors[0], -1.0, 1.0)
        headers = _headers(embedder, made, started)
        return await json_response(cosines, floats=len(sentences), headers=headers)


@router.post(
    "/v1/embeddings", summary="TEI: its OpenAI-compatible route", responses={200: {"model": OpenAIEmbeddingReply}}
)
@router.post("/embeddings", include_in_schema=False)
async def openai_embeddings(request: Request, body: TeiOpenAIRequest) -> Response:
    """Answer as /v1/embeddings does, with TEI's headers; `model` is not looked at, as in TEI."""
    started = time.perf_counter()
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        response, made = await embed_openai(request, body, embedder)
        response.headers.update(_headers(embedder, made, started))
        return response


@router.post("/tokenize", summary="TEI: texts to tokens", responses={200: {"model": list[list[TeiToken]]}})
async def tokenize(request: Request, body: TeiTokenizeRequest) -> Response:
    """Answer with each text's tokens, uncut."""
    texts = body.texts()
    check_inputs(request, texts, "inputs")
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        tokenized = await embedder.tokenize(
            texts, add_special_tokens=body.add_special_tokens, prompt_name=body.prompt_name
        )
        prompt = embedder.info.prompts.get(body.prompt_name, "") if body.prompt_name else ""

    def payload() -> list[list[dict[str, Any]]]:
        return [_tokens(prompt + text, pieces) for text, pieces in zip(texts, tokenized, strict=True)]

    return await json_response(payload, floats=sum(map(len, tokenized)) * len(TeiToken.model_fields))


def _tokens(text: str, pieces: Sequence[TokenPiece]) -> list[dict[str, Any]]:
    at = _byte_offsets(text)
    return [
        {
            "id": piece.id,
            "text": piece.text,
            "special": piece.special,
            "start": None if piece.start is None else at[piece.start],
            "stop": None if piece.stop is None else at[piece.stop],
        }
        for piece in pieces
    ]


def _byte_offsets(text: str) -> Sequence[int]:
    """Return, for each character of *text* and for its end, how many bytes of UTF-8 come before it."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(character.encode()) for character in text)]


@router.post("/decode", summary="TEI: token ids to texts")
async def decode(request: Request, body: TeiDecodeRequest) -> list[str]:
    """Answer with one text a sequence of ids."""
    sequences = body.sequences()
    check_inputs(request, sequences, "ids")
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        return await embedder.decode(sequences, skip_special_tokens=body.skip_special_tokens)


add_health(router)


@router.get("/info", summary="TEI: the model and the limits")
async def info(request: Request) -> TeiInfo:
    """Describe the default model in TEI's terms."""
    settings = embedding_of(request).settings
    async with models_of(request).use(None, deadline_of(request)) as embedder:
        model: ModelInfo = embedder.info
    return TeiInfo(
        model_id=model.name,
        model_sha=model.revision or None,
        model_dtype=DTYPES.get(model.precision, model.precision),
        served_model_name=model.name,
        model_type=TeiModelType(embedding=TeiPooling(pooling=POOLINGS.get(model.pooling, model.pooling))),
        max_concurrent_requests=settings.max_concurrent_requests,
        max_input_length=model.max_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_requests=settings.max_batch_items,
        max_client_batch_size=settings.max_client_batch,
        auto_truncate=settings.auto_truncate,
        tokenization_workers=settings.tokenizer_threads,
        version=version("tercet"),
    )
