"""OpenAI's embeddings API: `POST /v1/embeddings` and `GET /v1/models`, errors with the statuses its SDK expects."""

from fastapi import APIRouter, Request, Response

from services.common.app import deadline_of
from services.common.http_errors import dialect_route
from services.common.wire.embedding import ModelList, OpenAIEmbeddingReply, OpenAIEmbeddingRequest
from services.embedding.routes import embedder_of, encode_vectors, json_response, lane_of, models

router = APIRouter(prefix="/v1", route_class=dialect_route("openai"), tags=["openai"])


@router.post("/embeddings", summary="OpenAI-compatible embeddings", responses={200: {"model": OpenAIEmbeddingReply}})
async def embeddings(request: Request, body: OpenAIEmbeddingRequest) -> Response:
    """Embed one text or up to 2,048; unit-length vectors, as floats or as base64 of little-endian float32."""
    embedder = embedder_of(request)
    embedder.check_model(body.model)
    texts = body.texts()
    made = await embedder.embed(texts, lane=lane_of(len(texts)), deadline=deadline_of(request))
    rows = encode_vectors(made.vectors, body.encoding_format)
    total = sum(made.tokens)
    payload = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": embedder.info.name,
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }
    return await json_response(payload, floats=made.vectors.size if body.encoding_format == "float" else 0)


@router.get("/models", summary="OpenAI-compatible list of models")
async def list_models(request: Request) -> ModelList:
    """List the models by name."""
    return await models(request)
