"""What scoring is asked and gives, and who keeps bytes for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from services.common.batching import Lane
from services.common.deadline import Deadline

LongDocuments = Literal["windows", "first"]
Stage = Literal["first", "last"]

_ENTRY_BYTES = 350  # What Python keeps for a score and its key.


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """
    How a request wants its documents scored.

    With *allow_partial* a deadline that passes leaves documents without a score, else it is an error. *caller* is
    whose work it is. *long_documents* says what is read of a document that does not fit beside the query: `windows`
    all of it, part by part, `first` the first part. *max_document_tokens* cuts each document beforehand, None does not.
    *priors* is how good the caller holds each document to be, on any scale.
    """

    lane: Lane
    deadline: Deadline
    allow_partial: bool = False
    caller: str = ""
    long_documents: LongDocuments = "windows"
    max_document_tokens: int | None = None
    priors: Sequence[float] | None = None


class RawScore(NamedTuple):
    """
    One scorer's own score of a document: that of its best passage.

    *tokens* were read of it and of the query beside it, in *passages* passages; *best_passage* is where the best one is
    in the text, in characters, None where the tokenizer knows not. *complete* is false where the deadline came before
    all passages were scored; *cached* says that the score was known.
    """

    raw: float
    tokens: int
    passages: int
    best_passage: tuple[int, int] | None
    complete: bool = True
    cached: bool = False

    @property
    def nbytes(self) -> int:
        """What it takes in memory, roughly."""
        return _ENTRY_BYTES


@dataclass(slots=True)
class Timings:
    """Where the time went, in milliseconds; `queue_ms` is the longest wait, the others are sums."""

    tokenization_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0

    def add(self, other: "Timings") -> None:
        """Add what came after."""
        self.tokenization_ms += other.tokenization_ms
        self.queue_ms = max(self.queue_ms, other.queue_ms)
        self.inference_ms += other.inference_ms


@dataclass(frozen=True, slots=True)
class RawScores:
    """A scorer's own scores in the order of the documents, None where the deadline came first; *query_cut* as QueryTokens."""

    documents: list[RawScore | None]
    query_cut: bool
    timings: Timings


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """
    A document's score, from 0 to 1 or the scorer's own; the rest as RawScore, *tokens* those of all scorers that read it.

    *stage* is that of the scorer that had the last word: `first` where a cascade's second scorer did not come to it.
    """

    score: float
    tokens: int
    passages_scored: int
    best_passage: tuple[int, int] | None
    complete: bool
    cached: bool
    stage: Stage


@dataclass(frozen=True, slots=True)
class Scored:
    """
    A score for each document in the order given, None where the deadline came first; *query_cut* as QueryTokens.

    *tokens* counts those of all documents scored, *cached_tokens* those of scores that were known.
    """

    documents: list[DocumentScore | None]
    query_cut: bool
    tokens: int
    cached_tokens: int
    tokenization_ms: float
    queue_ms: float
    inference_ms: float

    def ranking(self) -> list[int]:
        """Return document positions: scored ones by falling score, then unscored ones in the order given."""
        scored = [(-one.score, index) for index, one in enumerate(self.documents) if one is not None]
        unscored = [index for index, one in enumerate(self.documents) if one is None]
        return [index for _, index in sorted(scored)] + unscored


class SharedBytes(Protocol):
    """Bytes by key that processes share. Its loss is no error: nothing is found then, and nothing kept."""

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return what is there for each key, in order; one round trip."""
        ...

    def put_later(self, entries: Mapping[bytes, bytes]) -> None:
        """Have *entries* kept, in the background; too many at a time are not."""
        ...


class ScoringObserver(Protocol):
    """Hears of documents, for metrics."""

    def looked_up(self, hits: int, misses: int) -> None:
        """So many of the documents that have a score were known, and were not."""
        ...

    def scored(self, last: int, first: int, unscored: int) -> None:
        """A request's documents got so many scores of the last stage, of the first one only, and none."""
        ...
