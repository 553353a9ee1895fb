"""Shapes of the search service: the search request, its reply, and the status."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from services.common.wire.base import (
    CollectionName,
    QueryText,
    ReplyModel,
    RequestModel,
    Vector,
)
from services.common.wire.collections import CollectionReply

MAX_K = 1000
Mode = Literal["hybrid", "dense", "lexical"]
Fusion = Literal["standardized", "rrf"]
ScoreKind = Literal["blended", "fused", "dense", "bm25"]
Degradation = Literal[
    "embedding_unavailable",
    "embedding_late",
    "rerank_unavailable",
    "rerank_late",
    "rerank_partial",
    "shards_partial",
    "catching_up",
    "cache_unavailable",
]


class SearchRequest(RequestModel):
    """
    A question for one collection.

    *query* is taken as plain words: no character in it is query syntax. *query_vector* replaces the embedding step
    and, without *query*, allows only `mode: dense`.
    """

    query: QueryText | None = None
    query_vector: Vector | None = None
    collection: CollectionName | None = Field(default=None, description="The default collection when left out.")
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    offset: Annotated[int, Field(ge=0, le=9000)] = 0
    mode: Mode = "hybrid"
    fusion: Fusion = "standardized"
    filter: dict[str, Any] | None = Field(default=None, description="Mongo-style conditions on metadata.")
    rerank: bool = True
    candidates: Annotated[int, Field(ge=1, le=MAX_K)] | None = Field(
        default=None, description="How many candidates each retriever proposes."
    )
    rerank_candidates: Annotated[int, Field(ge=1, le=200)] | None = Field(
        default=None, description="How many fused candidates the reranker scores."
    )
    include: frozenset[Literal["text", "metadata", "vector"]] = frozenset({"text", "metadata"})
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    min_seq: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Wait until this operation is applied, to read one's own write."
    )
    cache: bool = Field(default=True, description="False: neither read nor write the result cache.")

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
            raise PydanticCustomError("missing", "is required (or query_vector with mode dense)", {"param": "query"})
        if self.query is None and self.mode != "dense":
            raise PydanticCustomError("missing", "is required in mode {mode}", {"mode": self.mode, "param": "query"})
        return self


class StageScores(ReplyModel):
    """A hit's score at each stage; a stage that did not see it has none."""

    dense: float | None = None
    bm25: float | None = None
    fused: float | None = None
    rerank: float | None = None


class Hit(ReplyModel):
    """One answer; `score` is of the kind that `score_kind` names and falls from hit to hit within one kind."""

    id: str
    score: float
    score_kind: ScoreKind
    text: str | None = None
    title: str | None = None
    metadata: dict[str, Any] | None = None
    vector: list[float] | None = None
    stages: StageScores


class ShardCoverage(ReplyModel):
    """How many shards there are and what became of each."""

    total: int
    ok: int
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


class SearchReply(ReplyModel):
    """The answer, and what it is worth."""

    collection: str
    hits: list[Hit]
    coverage: Coverage
    degraded: list[Degradation]
    pipeline: PipelineReply
    cache: CacheReply
    as_of: int
    timings_ms: dict[str, float]
    request_id: str | None = None


class StatusReply(ReplyModel):
    """`GET /status`: how things stand, as this process knows it."""

    version: str
    collections: list[CollectionReply]
    dependencies: dict[str, dict[str, Any]]
    cache: dict[str, Any]
