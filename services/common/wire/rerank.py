"""Shapes of the rerank service: its native `/rerank`, and `/v1/rerank` (one reply serves Jina, Cohere v1 and vLLM clients)."""

from typing import Annotated

from pydantic import Field, FiniteFloat

from services.common.wire.base import LongText, QueryText, ReplyModel, RequestModel
from services.common.wire.embedding import Timings

MAX_DOCUMENTS = 1000


class RerankDocument(RequestModel):
    """A document given as an object."""

    text: LongText


class RerankRequest(RequestModel):
    """
    Documents to score against a query, the likeliest first: at the deadline the scored prefix comes back.

    A document over the model's limit is cut; the query never is.
    """

    query: QueryText
    documents: Annotated[list[LongText | RerankDocument], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str | None = Field(default=None, description="The model's name; the default model when left out.")
    top_n: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Return only the best so many.")
    return_documents: bool = False

    def texts(self) -> list[str]:
        """Return the documents' texts, in order."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class NativeRerankRequest(RerankRequest):
    """The native request adds the model's own scores and an explicit choice about partial answers."""

    raw_scores: bool = Field(default=False, description="The model's own scores instead of values from 0 to 1.")
    allow_partial: bool = Field(
        default=True, description="False: a deadline that passes before every document is scored is an error."
    )


class RerankResult(ReplyModel):
    """One document's score; `scored` is false, and the score absent, where the deadline came first."""

    index: int
    score: FiniteFloat | None = None
    scored: bool
    text: str | None = None


class RerankUsage(ReplyModel):
    """Real tokens over all pairs scored."""

    prompt_tokens: int
    total_tokens: int


class RerankReply(ReplyModel):
    """Scored documents by falling score, then the unscored ones in the order given."""

    results: list[RerankResult]
    model: str
    fingerprint: str
    usage: RerankUsage
    timings: Timings


class RerankInfo(ReplyModel):
    """`GET /info`: the scorer, what a score is made of, and how it runs here."""

    model: str
    kind: str
    score: str
    fingerprint: str
    max_tokens: int
    runtime: str
    precision: str


class CompatibleDocument(ReplyModel):
    """The document as Cohere v1 and Jina return it."""

    text: str


class CompatibleRerankResult(ReplyModel):
    """`document` is left out, not null, unless it was asked for: a null breaks clients."""

    index: int
    relevance_score: float
    document: CompatibleDocument | None = None


class CompatibleRerankReply(ReplyModel):
    """The superset reply that Jina, Cohere v1 and vLLM clients each read their part of."""

    id: str
    model: str
    results: list[CompatibleRerankResult]
    usage: RerankUsage
    meta: dict[str, dict[str, str | int]]
