"""The embedding and rerank services as the pipeline sees them, over HTTP."""

import base64
from collections.abc import Sequence
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from services.common.deadline import Deadline
from services.common.errors import DependencyUnavailable
from services.common.http_client import ServiceClient
from services.common.wire.embedding import EmbeddingInfo, EmbedReply, EmbedRequest
from services.common.wire.rerank import NativeRerankRequest, RerankReply
from services.search.joining import JoinedQuestions
from services.search.ports import Embedded, EmbeddingModel, Reranked

ANSWER_MARGIN_S = 0.02  # For the reply's way back: a partial answer that arrives late is lost.


class HttpEmbeddingClient:
    """Speaks the native `/embed`, with base64 vectors; large batches to *bulk*, and to *client* where that is not available."""

    def __init__(self, client: ServiceClient, bulk: ServiceClient | None = None) -> None:
        self._client = client
        self._bulk = bulk
        self._questions = JoinedQuestions(self._embed_questions)

    async def embed_query(self, text: str, deadline: Deadline, *, model: str | None = None) -> Embedded:
        """See EmbeddingClient. Questions that come together share a call."""
        return await self._questions.ask(text, deadline, model)

    async def _embed_questions(self, texts: Sequence[str], deadline: Deadline, model: str | None) -> Embedded:
        body = EmbedRequest(inputs=list(texts), input_type="query", lane="query", encoding="base64", model=model)
        return await self._embed(self._client, body, deadline)

    async def embed_queries(self, texts: Sequence[str], deadline: Deadline, *, model: str | None = None) -> Embedded:
        """See EmbeddingClient."""
        body = EmbedRequest(inputs=list(texts), input_type="query", lane="bulk", encoding="base64", model=model)
        return await self._embed_bulk(body, deadline)

    async def embed_documents(self, texts: Sequence[str], deadline: Deadline, *, model: str | None = None) -> Embedded:
        """See EmbeddingClient."""
        body = EmbedRequest(inputs=list(texts), input_type="document", lane="bulk", encoding="base64", model=model)
        return await self._embed_bulk(body, deadline)

    async def _embed_bulk(self, body: EmbedRequest, deadline: Deadline) -> Embedded:
        if self._bulk is not None:
            try:
                return await self._embed(self._bulk, body, deadline, bulk=True)
            except DependencyUnavailable:
                pass  # A pool that may be scaled to nothing: the other one does the work, more slowly.
        return await self._embed(self._client, body, deadline, bulk=True)

    async def _embed(
        self, client: ServiceClient, body: EmbedRequest, deadline: Deadline, *, bulk: bool = False
    ) -> Embedded:
        reply = await client.call("POST", "/embed", EmbedReply, body=body, deadline=deadline, bulk=bulk)
        vectors = _decode(reply)
        if len(vectors) != len(body.texts()):
            raise DependencyUnavailable(f"embedding sent {len(vectors)} vectors for {len(body.texts())} texts")
        return Embedded(vectors, EmbeddingModel(reply.model, reply.fingerprint, vectors.shape[1]))

    async def model(self, deadline: Deadline, *, model: str | None = None) -> EmbeddingModel:
        """See EmbeddingClient."""
        path = "/info" if model is None else f"/info?{urlencode({'model': model})}"
        info = await self._client.call("GET", path, EmbeddingInfo, deadline=deadline)
        return EmbeddingModel(info.model, info.fingerprint, info.dim)


def _decode(reply: EmbedReply) -> NDArray[np.float32]:
    try:
        rows = [np.frombuffer(base64.b64decode(str(item.embedding)), dtype="<f4") for item in reply.data]
        return np.stack(rows).astype(np.float32)
    except ValueError:
        raise DependencyUnavailable("embedding sent vectors that cannot be read") from None


class HttpRerankClient:
    """Speaks the native `/rerank`, taking partial answers."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client
        self._under_way = 0

    @property
    def under_way(self) -> int:
        """See RerankClient."""
        return self._under_way

    async def rerank(
        self, query: str, texts: Sequence[str], deadline: Deadline, *, priors: Sequence[float]
    ) -> Reranked:
        """See RerankClient. The service is asked to answer a little before *deadline*, so that its part comes in time."""
        body = NativeRerankRequest(query=query, documents=list(texts), priors=list(priors))
        answer_by = deadline.earlier(ANSWER_MARGIN_S)
        self._under_way += 1
        try:
            reply = await self._client.call(
                "POST", "/rerank", RerankReply, body=body, deadline=deadline, answer_by=answer_by, work_s=_scoring_s
            )
        finally:
            self._under_way -= 1
        scores: list[float | None] = [None] * len(texts)
        for result in reply.results:
            if not 0 <= result.index < len(texts):
                raise DependencyUnavailable("rerank sent a result for a document that was not given")
            scores[result.index] = result.score
        coarse = frozenset(result.index for result in reply.results if result.stage == "first")
        return Reranked(scores, reply.model, reply.fingerprint, coarse)


def _scoring_s(reply: RerankReply) -> float:
    """Return how long the scoring took: many long candidates take what they take."""
    return (reply.timings.tokenization_ms + reply.timings.inference_ms) / 1000
