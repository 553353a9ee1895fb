"""Retrieval over all shards of a collection, as the pipeline needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.common.deadline import Deadline
from services.search.ports.ledger import Collection
from services.search.ports.shards import AuditReport, Candidate, LexicalStatistics, Match, ShardDocument, ShardStanding
from services.search.ports.values import LexicalMatch, Vector


@dataclass(frozen=True, slots=True)
class RetrievalQuery:
    """
    What the pipeline asks of a collection; *text* is the caller's own words, analysed as the collection's documents are.

    *stop_words* False leaves the language's commonest words out of the question, unless it has no others. The other
    fields mean what they mean in ShardQuery.
    """

    limit: int
    vector: Vector | None = None
    text: str | None = None
    filter: Any = None
    match: LexicalMatch = "any"
    prefix: bool = False
    stop_words: bool = True
    exact: bool = False
    explain: bool = False
    facets: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardCall:
    """Which host answered for a shard, after how long (of all attempts), and how many were asked; see ShardPlan."""

    host: str
    took_ms: float
    applied_seq: int
    attempts: int = 1
    hedged: bool = False


@dataclass(frozen=True, slots=True)
class Retrieved:
    """
    All shards' candidates together, which shards they are from, and the lowest `applied_seq` among them.

    *terms* are the question's analysed words and *statistics* the whole collection's, where BM25 ran. *fallback* counts
    the shards in whose place the compressed copy answered; *plans* has each shard's plan when it was asked for, and
    *calls* who answered. *breaker_open* counts those of *failures* that nobody was asked for, as the breakers of all their
    hosts are open; *lexical_failed* those that are ok but could not search their words.
    """

    candidates: Sequence[Candidate]
    total: int
    ok: int
    catching_up: int
    failures: Mapping[int, str]
    timed_out: int
    as_of: int
    timings_ms: Mapping[str, float]
    terms: Sequence[str] = ()
    statistics: LexicalStatistics | None = None
    fallback: int = 0
    breaker_open: int = 0
    lexical_failed: int = 0
    plans: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    calls: Mapping[int, ShardCall] = field(default_factory=dict)
    facets: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetched:
    """Stored fields by document id, the shards that gave none of theirs, and those of them that ran out of time."""

    documents: Mapping[str, ShardDocument]
    failed: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()


class Retriever(Protocol):
    """The shards of all collections, wherever they are."""

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        """Ask all shards side by side; those that fail or are late are reported, not raised."""
        ...

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> Fetched:
        """Return the stored fields of *candidates* by id; those that are gone, or whose shard fails, are missing."""
        ...

    async def matching(self, collection: Collection, filter: Any, deadline: Deadline, *, limit: int) -> list[Match]:
        """
        Return up to *limit* live documents that match *filter*, of all shards.

        Raises:
            DependencyUnavailable, DeadlineExceeded: A shard did not answer, so that some may be missing.
        """
        ...

    def notify(self, collection: Collection, seq: int) -> None:
        """Say that the ledger has operations up to *seq* now, so that shards follow without waiting for a poll."""
        ...

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        """Wait until a replica of every shard has applied *seq*; False when the deadline came first."""
        ...

    async def applied_seq(self, collection: Collection) -> int:
        """Return the lowest `applied_seq` of the collection's shards, each by its best replica."""
        ...

    async def standings(self, collection: Collection, deadline: Deadline) -> Mapping[str, Sequence[ShardStanding]]:
        """Return how the collection's shards stand, by the name of the host; hosts that do not answer are missing."""
        ...

    async def audit(
        self, collection: Collection, deadline: Deadline, *, repair: bool
    ) -> Mapping[str, Sequence[AuditReport]]:
        """Compare every shard on every host with the ledger, and mend it on request; by the name of the host."""
        ...

    async def snapshot(self, collection: Collection, deadline: Deadline) -> Mapping[str, Mapping[int, int]]:
        """Let every host write snapshots now; return, by host and shard, the operation number each is true for."""
        ...

    async def forget(self, collection: Collection) -> None:
        """Close and remove the shards of a deleted collection."""
        ...


@dataclass(frozen=True, slots=True)
class Highlight:
    """A passage of a text, and the places in it (start, end, in characters of the passage) that the question's words hit."""

    text: str
    marks: Sequence[tuple[int, int]]


class Highlighter(Protocol):
    """Finds the passage of a text that answers a question's words best."""

    def highlight(self, text: str, terms: Sequence[str], language: str, *, max_chars: int) -> Highlight | None:
        """Return the best passage of at most *max_chars* characters; None where *text* has none of *terms*."""
        ...
