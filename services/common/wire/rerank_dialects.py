"""
What Cohere's, Jina's and vLLM's clients send to be reranked or scored, and replies that each reads its part of.

Sources: cohere-python (v1 and v2 clients), Jina's reranker API, vLLM's pooling/scoring/protocol.py (2026). All three ignore
fields that they do not know. A document may be empty; a query may not.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AliasChoices, Discriminator, Field, FiniteFloat, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError

from services.common.wire.base import QueryText, ReplyModel, RerankedText
from services.common.wire.dialects import DialectModel, single_or_list
from services.common.wire.openai import OpenAIUsage
from services.common.wire.rerank import FewEnough

COHERE_TOKENS_PER_DOC = 4096
DEFAULT_SPAN_THRESHOLD = 0.1


def _value_kind(value: Any) -> str:
    return "str" if isinstance(value, str) else "value[json]"


def _document_kind(value: Any) -> str:
    return "dict[str]" if isinstance(value, dict) else "str"


def _list_kind(value: Any) -> str:
    return "list[str]" if isinstance(value, list) else "str"


_Value = Annotated[
    Annotated[RerankedText, Tag("str")] | Annotated[JsonValue, Tag("value[json]")], Discriminator(_value_kind)
]
# A text, or an object in which some fields are texts.
DialectDocument = Annotated[
    Annotated[RerankedText, Tag("str")] | Annotated[dict[str, _Value], Tag("dict[str]")], Discriminator(_document_kind)
]


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("zero", "must be -1 for the model's own limit, or at least 1")
    return value


class ScoringOptions(DialectModel):
    """
    What these servers' requests share.

    *truncate_prompt_tokens* (vLLM) reads one window alone, -1 as much as fits in it; *max_tokens_per_doc* (Cohere, vLLM) of 0 is
    no limit; *priority* above 0 can wait; *use_activation* false asks for the model's own scores.
    """

    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), AfterValidator(_not_zero)] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=0)] | None = None
    priority: int | None = None
    use_activation: bool | None = None

    @property
    def first_window_only(self) -> bool:
        """Whether only the beginning of a long document is to be read."""
        return self.truncate_prompt_tokens is not None

    def document_tokens(self, window_tokens: int) -> int | None:
        """Return how many tokens of a document may be read, by a model that reads *window_tokens* at once; None is no limit."""
        asked = self._token_limits(window_tokens)
        return min((tokens for tokens in asked if tokens is not None and tokens > 0), default=None)

    def _token_limits(self, window_tokens: int) -> list[int | None]:
        del window_tokens
        return [self.truncate_prompt_tokens, self.max_tokens_per_doc]

    @property
    def can_wait(self) -> bool:
        """Whether the caller says that others go first."""
        return self.priority is not None and self.priority > 0

    @property
    def raw(self) -> bool:
        """Whether the model's own scores are asked for."""
        return self.use_activation is False


class RelevantSpans(DialectModel):
    """Whether the reply is to say where in a document the relevant text is (Cohere v2)."""

    mode: Literal["enabled", "disabled"]
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    max_spans: Annotated[int, Field(ge=0)] | None = None

    def admit(self, score: float) -> bool:
        """Return whether a span of this *score* is to be returned."""
        least = DEFAULT_SPAN_THRESHOLD if self.threshold is None else self.threshold
        return self.mode == "enabled" and self.max_spans != 0 and score >= least


class CohereRerankRequest(ScoringOptions):
    """
    `POST /v1/rerank` of Cohere, Jina and vLLM. *top_n* of 0 is all, as at vLLM.

    A document given as an object is ranked by its `text`, or by its *rank_fields*, each on a line of its own, in that order.
    A chunk of *max_chunks_per_doc* is as long as what the model reads at once.
    """

    query: QueryText
    documents: Annotated[list[DialectDocument], Field(min_length=1), FewEnough]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    rank_fields: Annotated[list[str], Field(min_length=1)] | None = None
    max_chunks_per_doc: Annotated[int, Field(ge=1)] | None = None
    relevant_spans: RelevantSpans | None = None

    @model_validator(mode="after")
    def _ranked_fields_are_texts(self) -> Self:
        for index, document in enumerate(self.documents):
            if isinstance(document, dict):
                for field in self._fields:
                    _check_field(document, field, f"documents.{index}.{field}")
        return self

    @property
    def _fields(self) -> list[str]:
        return self.rank_fields or ["text"]

    @property
    def first_window_only(self) -> bool:
        """Whether only the beginning of a long document is to be read."""
        return super().first_window_only or self.max_chunks_per_doc == 1

    def _token_limits(self, window_tokens: int) -> list[int | None]:
        chunks = self.max_chunks_per_doc
        return [*super()._token_limits(window_tokens), None if chunks is None else chunks * window_tokens]

    def texts(self) -> list[str]:
        """Return what is to be scored of each document, in order."""
        return [self.text_of(index) for index in range(len(self.documents))]

    def text_of(self, index: int) -> str:
        """Return what is to be scored of one document."""
        document = self.documents[index]
        return document if isinstance(document, str) else "\n".join(str(document[field]) for field in self._fields)

    def document_of(self, index: int) -> dict[str, Any]:
        """Return one document as the reply has it: an object with all its fields, and always with a `text`."""
        document = self.documents[index]
        return {"text": self.text_of(index), **(document if isinstance(document, dict) else {})}


def _check_field(document: dict[str, Any], field: str, name: str) -> None:
    if field not in document:
        raise PydanticCustomError(
            "missing", "is missing, and the document is to be ranked by it", {"param": name[:200]}
        )
    if not isinstance(document[field], str):
        raise PydanticCustomError("string_type", "must be a string to be ranked by", {"param": name[:200]})


class CohereV2RerankRequest(CohereRerankRequest):
    """`POST /v2/rerank`: documents are cut to 4,096 tokens unless something else is asked."""

    max_tokens_per_doc: Annotated[int, Field(ge=0)] | None = COHERE_TOKENS_PER_DOC


class RelevantSpan(ReplyModel):
    """Characters *start* to *end*, exclusive, of a document, and their score."""

    start: int
    end: int
    score: FiniteFloat


class CohereRerankResult(ReplyModel):
    """`document` is left out, not null, unless it was asked for: a null breaks clients."""

    index: int
    relevance_score: FiniteFloat
    document: dict[str, Any] | None = None
    relevant_spans: list[RelevantSpan] | None = None


class CohereMeta(ReplyModel):
    """Which version answered, and what Cohere would have counted: a search unit for each hundred documents."""

    api_version: dict[str, str]
    billed_units: dict[str, int]
    warnings: list[str] | None = None


class CohereRerankReply(ReplyModel):
    """Cohere v2's reply: results by falling score."""

    id: str
    results: list[CohereRerankResult]
    meta: CohereMeta


class CompatibleRerankReply(CohereRerankReply):
    """The superset reply that Jina, Cohere v1 and vLLM clients each read their part of."""

    model: str
    usage: OpenAIUsage


_Queries = Annotated[
    Annotated[QueryText, Tag("str")] | Annotated[list[QueryText], Field(min_length=1), FewEnough, Tag("list[str]")],
    Discriminator(_list_kind),
]
_Documents = Annotated[
    Annotated[RerankedText, Tag("str")]
    | Annotated[list[RerankedText], Field(min_length=1), FewEnough, Tag("list[str]")],
    Discriminator(_list_kind),
]


class ScoreRequest(ScoringOptions):
    """`POST /score` (vLLM): one query with each document, or as many queries as documents, one with one."""

    queries: _Queries = Field(validation_alias=AliasChoices("queries", "text_1", "data_1"))
    documents: _Documents = Field(validation_alias=AliasChoices("documents", "text_2", "items", "data_2"))

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        queries, documents = len(single_or_list(self.queries)), len(single_or_list(self.documents))
        if queries not in (1, documents):
            raise PydanticCustomError(
                "lengths",
                "must be one text, or as many as there are documents ({documents}), not {queries}",
                {"param": "queries", "queries": queries, "documents": documents},
            )
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """Return each document with its query, in the order of the documents."""
        queries, documents = single_or_list(self.queries), single_or_list(self.documents)
        if len(queries) == 1:
            queries = queries * len(documents)
        return list(zip(queries, documents, strict=True))


class ScoreItem(ReplyModel):
    """One pair's score."""

    index: int
    object: Literal["score"] = "score"
    score: FiniteFloat


class ScoreReply(ReplyModel):
    """Scores in the order of the documents."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreItem]
    usage: OpenAIUsage
