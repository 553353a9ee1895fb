"""Shapes of the rerank service's native routes: `/rerank` and `/info`; and the limits that its dialects share."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from services.common.wire.base import MAX_INPUT_CHARS, QueryText, ReplyModel, RequestModel, RerankedText
from services.common.wire.embedding import Timings

MAX_DOCUMENTS = 1000
MAX_DOCUMENT_CHARS = MAX_INPUT_CHARS


def _few_enough(value: Any) -> Any:
    """Refuse a list over the limit before its items are looked at."""
    if isinstance(value, list) and len(value) > MAX_DOCUMENTS:
        raise PydanticCustomError(
            "too_many",
            "at most {most} are allowed in one request, and there are {count}",
            {"most": MAX_DOCUMENTS, "count": len(value)},
        )
    return value


# What a list of documents is annotated with in every dialect.
FewEnough = BeforeValidator(_few_enough)


class RerankDocument(RequestModel):
    """A document given as an object."""

    text: RerankedText


class NativeRerankRequest(RequestModel):
    """
    Documents to score against a query, the likeliest first: at the deadline those scored so far come back.

    A document may be empty. One that the model cannot read at once is read in overlapping windows, the best of which
    counts. A query over half of what the model reads is cut, and the reply says so.
    """

    query: QueryText
    documents: Annotated[list[RerankedText | RerankDocument], Field(min_length=1), FewEnough]
    model: str | None = Field(default=None, description="The model's name; the default model when left out.")
    top_n: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Return only the best so many.")
    return_documents: bool = False
    raw_scores: bool = Field(default=False, description="The model's own scores instead of values from 0 to 1.")
    allow_partial: bool = Field(
        default=True, description="False: a deadline that passes before every document is scored is an error."
    )
    long_documents: Literal["windows", "first"] | None = Field(
        default=None,
        description="`windows` reads long documents whole and takes the best window, `first` reads their beginning; the "
        "service's setting when left out.",
    )
    max_document_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Documents are cut to so many tokens before anything else."
    )
    priors: list[FiniteFloat] | None = Field(
        default=None,
        description="How good each document is by what you know, on any scale, more being better: where a first model "
        "chooses what the second one reads, it counts beside the first one's score.",
    )

    @field_validator("priors")
    @classmethod
    def _one_for_each_document(cls, priors: list[float] | None, info: ValidationInfo) -> list[float] | None:
        documents = info.data.get("documents")
        if priors is not None and documents is not None and len(priors) != len(documents):
            raise ValueError(
                f"there are {len(priors)} for {len(documents)} documents: give one for each, or none at all"
            )
        return priors

    def texts(self) -> list[str]:
        """Return the documents' texts, in order."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class Passage(ReplyModel):
    """Characters *start* to *end*, exclusive, of a document."""

    start: int
    end: int


class RerankResult(ReplyModel):
    """
    One document's score; `scored` is false, and the score absent, where the deadline came first.

    *passages_scored* windows of it were read, and *best_passage* is the one that gave the score; *complete* is false
    where the deadline came before all of them were. *stage* is `first` where only the first of two models had time for it.
    """

    index: int
    score: FiniteFloat | None = None
    scored: bool
    text: str | None = None
    passages_scored: int | None = None
    best_passage: Passage | None = None
    complete: bool | None = None
    stage: str | None = None


class RerankUsage(ReplyModel):
    """Real tokens over all pairs scored, special ones included; *cached_tokens* are those of pairs known from before."""

    prompt_tokens: int
    total_tokens: int
    cached_tokens: int = 0


class RerankReply(ReplyModel):
    """Scored documents by falling score, then the unscored ones in the order given."""

    results: list[RerankResult]
    model: str
    fingerprint: str
    query_truncated: bool = False
    usage: RerankUsage
    timings: Timings


class RerankInfo(ReplyModel):
    """
    `GET /info`: the scorer, what a score is made of, and how it runs here.

    *labels* are a classifier's; *ranks* is false where only classification is served.
    """

    model: str
    kind: str
    score: str
    fingerprint: str
    max_tokens: int
    runtime: str
    precision: str
    labels: list[str] = Field(default_factory=list)
    ranks: bool = True
    long_documents: str = ""
    limits: dict[str, int] = Field(default_factory=dict)
