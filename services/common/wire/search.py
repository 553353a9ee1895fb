"""Shapes of the search service: the search request and its reply."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from services.common.wire import examples
from services.common.wire.base import (
    CollectionName,
    MetadataKey,
    QueryText,
    ReplyModel,
    RequestModel,
    Vector,
)
from services.common.wire.errors import ErrorBody

MAX_K = 1000
MAX_DEPTH = 10_000
MAX_SEARCHES = 100
MAX_FACETS = 16
Mode = Literal["hybrid", "dense", "lexical"]
Fusion = Literal["standardized", "rrf"]
ScoreKind = Literal["blended", "fused", "dense", "bm25"]
Threshold = Literal["dense", "bm25", "fused", "rerank"]
Include = Literal["text", "metadata", "vector", "highlights"]
Degradation = Literal[
    "embedding_unavailable",
    "embedding_late",
    "lexical_unavailable",
    "rerank_unavailable",
    "rerank_late",
    "rerank_partial",
    "rerank_reduced",
    "shards_partial",
    "fallback_index",
    "catching_up",
    "cache_unavailable",
    "stale",
]
Requirement = Literal["dense", "lexical", "rerank", "all_shards", "primary", "caught_up", "cache", "fresh"]
Priority = Literal["high", "normal", "low"]


class LexicalOptions(RequestModel):
    """
    How words must match: any of them, all, or all in this order (`phrase`).

    With *prefix* the last word also stands for every word that begins with it. *stop_words* False leaves the language's
    commonest words out of the question, unless it has no others.
    """

    match: Literal["any", "all", "phrase"] = "any"
    prefix: bool = False
    stop_words: bool = True


class MinScore(RequestModel):
    """
    Leaves out hits whose score of one *kind*, as `stages` has it, is below *value*, and hits that have no such score.

    `dense` (cosine, inner product, or negative squared distance) and `rerank` (0 to 1) compare between searches; `bm25`
    between searches for the same words; `fused` orders one answer only. Where the stage could not run, which `degraded`
    says, nothing is left out for it.
    """

    kind: Threshold
    value: FiniteFloat


class Require(RequestModel):
    """
    Steps down that the caller forbids: a search that would have to take one fails with 503, or 504 where time ran out.

    *dense*: the question is embedded. *lexical*: BM25 runs. *rerank*: every candidate is reranked that the request asks
    for. *all_shards*: none is missing. *primary*: none is answered for by the fallback index. *caught_up*: none is behind
    the ledger. *cache*: the result cache can be reached. *fresh*: the answer is no older one, served as nothing better
    could be made. *full*: all of them but *cache*, whose loss changes no answer.
    """

    full: bool = False
    dense: bool = False
    lexical: bool = False
    rerank: bool = False
    all_shards: bool = False
    primary: bool = False
    caught_up: bool = False
    cache: bool = False
    fresh: bool = False


class SearchRequest(RequestModel):
    """
    A question for one collection.

    *query* is taken as plain words: no character in it is query syntax. *query_vector* replaces the embedding step
    and, without *query*, allows only `mode: dense`.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SEARCH_REQUEST]})

    query: QueryText | None = None
    query_vector: Vector | None = None
    collection: CollectionName | None = Field(default=None, description="The default collection when left out.")
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    offset: Annotated[int, Field(ge=0)] = Field(default=0, description="offset + k may be up to 10,000.")
    mode: Mode = "hybrid"
    fusion: Fusion = "standardized"
    filter: dict[str, Any] | None = Field(default=None, description="Mongo-style conditions on metadata.")
    lexical: LexicalOptions | None = Field(default=None, description="How words must match.")
    exact: bool = Field(default=False, description="Compare with every vector instead of searching approximately.")
    rerank: bool = True
    candidates: Annotated[int, Field(ge=1, le=MAX_K)] | None = Field(
        default=None, description="How many candidates each retriever proposes."
    )
    rerank_candidates: Annotated[int, Field(ge=1, le=200)] | None = Field(
        default=None, description="How many fused candidates the reranker scores."
    )
    min_score: MinScore | None = None
    group_by: MetadataKey | None = Field(default=None, description="A metadata field: one hit for each of its values.")
    diversity: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="How much hits should differ from each other: 0 by relevance alone, 1 by novelty alone.",
    )
    facets: Annotated[dict[MetadataKey, Annotated[int, Field(ge=1, le=1000)]], Field(max_length=MAX_FACETS)] = Field(
        default_factory=dict, description="Metadata fields whose commonest values are counted, up to a number for each."
    )
    include: frozenset[Include] = frozenset({"text", "metadata"})
    highlights_max_chars: Annotated[int, Field(ge=20, le=10_000)] = 240
    explain: bool = Field(default=False, description="Say how it was searched; such a search passes the cache by.")
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    min_seq: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Wait until this operation is applied, to read one's own write."
    )
    cache: bool = Field(default=True, description="False: neither read nor write the result cache.")
    max_stale_s: Annotated[float, Field(ge=0, le=86_400)] = Field(
        default=0.0, description="A cached answer may be used for so long although the collection has changed since."
    )
    require: Require = Field(default=Require(), description="Steps down that are forbidden.")

    @model_validator(mode="before")
    @classmethod
    def _include_list(cls, data: Any) -> Any:
        if (
            isinstance(data, dict)
            and isinstance(data.get("include"), list)
            and all(isinstance(x, str) for x in data["include"])
        ):
            return {**data, "include": frozenset(data["include"])}
        return data

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.query is None and self.query_vector is None:
            raise _wrong("query", "is required (or query_vector with mode dense)")
        if self.query is None and self.mode != "dense":
            raise _wrong("query", f"is required in mode {self.mode}")
        return self

    @model_validator(mode="after")
    def _in_reach(self) -> Self:
        if self.offset + self.k > MAX_DEPTH:
            raise _wrong(
                "offset",
                f"offset + k may be at most {MAX_DEPTH:,}; to read a whole collection follow the cursor of "
                "GET /collections/{collection}/documents",
            )
        return self

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        """Refuse what needs matched words in a search that matches none."""
        if self.mode != "dense":
            return self
        for name, asked in (("lexical", self.lexical is not None), ("include", "highlights" in self.include)):
            if asked:
                what = "highlights need" if name == "include" else "needs"
                raise _wrong(name, f"{what} mode hybrid or lexical")
        return self

    @model_validator(mode="after")
    def _has_the_score(self) -> Self:
        """Refuse a threshold on a stage that this search does not have."""
        kind = self.min_score.kind if self.min_score is not None else None
        if kind == "dense" and self.mode == "lexical":
            raise _wrong("min_score.kind", "dense needs mode hybrid or dense")
        if kind == "bm25" and self.mode == "dense":
            raise _wrong("min_score.kind", "bm25 needs mode hybrid or lexical")
        if kind == "rerank" and (not self.rerank or self.query is None):
            raise _wrong("min_score.kind", "rerank needs a query and rerank: true")
        return self


class BatchRequest(RequestModel):
    """Several searches, each answered or refused by itself; one that is malformed refuses them all, by its number."""

    searches: Annotated[list[SearchRequest], Field(min_length=1, max_length=MAX_SEARCHES)]

    @field_validator("searches", mode="wrap")
    @classmethod
    def _numbered(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> list[SearchRequest]:
        """Put the search's number before the field that a rule about the whole search names."""
        try:
            found: list[SearchRequest] = validate(value)
            return found
        except ValidationError as error:
            for item in error.errors(include_url=False):
                if "param" in item.get("ctx", {}):
                    raise _wrong(f"searches.{item['loc'][0]}.{item['ctx']['param']}", item["msg"]) from None
            raise


def _wrong(param: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{reason}", {"param": param, "reason": reason})


class StageScores(ReplyModel):
    """A hit's score at each stage; a stage that did not see it has none."""

    dense: float | None = None
    bm25: float | None = None
    fused: float | None = None
    rerank: float | None = None


class HighlightReply(ReplyModel):
    """A passage of a hit's text, and where in it (start and end, in Unicode characters) the question's words are."""

    text: str
    marks: list[tuple[int, int]]


class Hit(ReplyModel):
    """
    One answer; `score` is of the kind that `score_kind` names and, without `diversity`, falls within one kind.

    *highlights*, when asked for, holds the best passage; it is empty where the text has none of the question's words.
    """

    id: str
    score: float
    score_kind: ScoreKind
    text: str | None = None
    title: str | None = None
    metadata: dict[str, Any] | None = None
    vector: list[float] | None = None
    highlights: list[HighlightReply] | None = None
    stages: StageScores


class ShardCoverage(ReplyModel):
    """
    How many shards there are and what became of each.

    *fallback* of those that are *ok* were answered for by the compressed copy, whose vectors are approximate.
    """

    total: int
    ok: int
    fallback: int = 0
    timed_out: int = 0
    failed: int = 0
    breaker_open: int = 0
    catching_up: int = 0


class ShardFailure(ReplyModel):
    """Why one shard is missing from the answer."""

    shard: int
    reason: str


class Coverage(ReplyModel):
    """Which part of the collection was searched."""

    ratio: float
    shards: ShardCoverage
    failures: list[ShardFailure] = Field(default_factory=list)


class PipelineReply(ReplyModel):
    """What was really run."""

    retrieval: Mode
    rerank: str | None = None


class CacheReply(ReplyModel):
    """Whether the answer came from the result cache, and how old it is."""

    hit: bool
    age_ms: int | None = None
    stale: bool = False


class ShardPlan(ReplyModel):
    """
    How one shard searched: its filter's estimated and true selectivity, and which vector search it chose.

    *host* answered after *took_ms*, true for *applied_seq*; *attempts* hosts were asked, the last of them before the
    one before had answered if it was *hedged*.
    """

    shard: int
    plan: dict[str, Any]
    host: str | None = None
    took_ms: float | None = None
    applied_seq: int | None = None
    attempts: int = 1
    hedged: bool = False


class CacheExplanation(ReplyModel):
    """
    What the result cache would have said, which an explained search passes by.

    `fresh`: this answer, as the collection has not moved since *as_of*; `moved`: it has; `unproven`: whether it has
    cannot be known now; `absent`: there is no entry; `off`: the request says so; `unavailable`: it cannot be reached.
    """

    decision: Literal["fresh", "moved", "unproven", "absent", "off", "unavailable"]
    as_of: int | None = None
    age_ms: int | None = None
    watermark: int | None = None


class BudgetExplanation(ReplyModel):
    """The time that the search was given, the time that each stage was allowed, and how many candidates rerank could afford."""

    timeout_ms: float
    stages_ms: dict[str, float]
    rerank_candidates: int | None = None


class AdmissionExplanation(ReplyModel):
    """How full the service was: searches under way and allowed at once (by cost), and how long this one waited."""

    in_flight: float
    limit: float
    waited_ms: float
    pressure: float


class CandidateCounts(ReplyModel):
    """How many candidates there were: in all, with a vector's score, found by BM25, reranked, under the threshold."""

    total: int
    dense: int
    bm25: int
    reranked: int
    below_min_score: int


class FusionWeights(ReplyModel):
    """What the retrievers' scores weighed, BM25's after its confidence: the best score's share of the best possible."""

    method: Fusion
    dense: float
    bm25: float
    bm25_confidence: float


class Explanation(ReplyModel):
    """
    How the answer came about; *fusion* is missing where one retriever alone decided. `timings_ms` has the times.

    *breakers* has the state of each dependency's, by its name.
    """

    shards: list[ShardPlan]
    candidates: CandidateCounts
    fusion: FusionWeights | None = None
    cache: CacheExplanation | None = None
    budget: BudgetExplanation | None = None
    admission: AdmissionExplanation | None = None
    breakers: dict[str, str] = Field(default_factory=dict)


class SearchReply(ReplyModel):
    """The answer, and what it is worth."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SEARCH_REPLY]})

    collection: str = Field(description="The collection that was searched, by its own name.")
    hits: list[Hit] = Field(description="The page that was asked for, best first.")
    coverage: Coverage
    degraded: list[Degradation] = Field(description="The steps down that were taken; empty for a whole answer.")
    pipeline: PipelineReply
    cache: CacheReply
    as_of: int = Field(description="The last operation that every shard which answered had applied.")
    timings_ms: dict[str, float] = Field(description="How long each stage took, and the search in all (`total`).")
    facets: dict[str, dict[str, int]] | None = Field(
        default=None, description="For each field asked for its commonest values, and how many documents have them."
    )
    explain: Explanation | None = None
    request_id: str | None = Field(default=None, description="The request's id in logs and traces.")


class BatchAnswer(ReplyModel):
    """What one search of a batch came to: an *answer*, or an *error*."""

    answer: SearchReply | None = None
    error: ErrorBody | None = None


class BatchReply(ReplyModel):
    """The results in the order of the searches."""

    results: list[BatchAnswer]
