"""A shard, and the place that hosts shards, as the router needs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.common.deadline import Deadline
from services.search.ports.ledger import Collection, Operation
from services.search.ports.values import LexicalMatch, MetadataValue, Vector


@dataclass(frozen=True, slots=True)
class LexicalStatistics:
    """Over some set of documents: how many there are, and in how many each term occurs."""

    documents: int
    doc_freq: Mapping[str, int]

    def __add__(self, other: "LexicalStatistics") -> "LexicalStatistics":
        """Return the statistics of both sets together."""
        terms = {*self.doc_freq, *other.doc_freq}
        return LexicalStatistics(
            self.documents + other.documents,
            {term: self.doc_freq.get(term, 0) + other.doc_freq.get(term, 0) for term in terms},
        )


@dataclass(frozen=True, slots=True)
class ShardQuery:
    """
    What one shard is asked. A retriever runs when its part is there: *vector* for dense, *terms* for lexical.

    *terms* are analysed words, repeated as often as in the query; *statistics* are those of the whole collection,
    so that BM25 scores of different shards compare. *match* says how many of the terms a document must have (`phrase`:
    all, one after the other); with *prefix* the last term also stands for every term that begins with it.
    *filter* is a parsed expression of services/search/filters.py. *exact* forbids approximate vector search.
    *facets* asks for the commonest values of metadata fields, up to a number for each.
    """

    limit: int
    vector: Vector | None = None
    terms: Sequence[str] = ()
    statistics: LexicalStatistics | None = None
    filter: Any = None
    match: LexicalMatch = "any"
    prefix: bool = False
    exact: bool = False
    explain: bool = False
    facets: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A proposal: *dense* is the exact float32 score (whenever the query had a vector), *bm25* only if BM25 found it.

    The dense score is the cosine, the inner product, or for the metric l2 the negative squared distance.
    """

    id: str
    shard: int
    row: int
    dense: float | None
    bm25: float | None


@dataclass(frozen=True, slots=True)
class ShardAnswer:
    """
    The union of both retrievers' best *limit*, in no order; *applied_seq* is what it was true for.

    *plan* says, when asked to explain, how the filter and the vectors were searched. *facets* count, for each field
    asked for, the documents of each value among those that match the filter and, where there are terms, the terms.
    *fallback* is true where the compressed copy answered in the shard's place, *lexical_failed* where the words could
    not be searched and the candidates are those of the vectors alone.
    """

    shard: int
    applied_seq: int
    candidates: Sequence[Candidate]
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    facets: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    catching_up: bool = False
    fallback: bool = False
    lexical_failed: bool = False


@dataclass(frozen=True, slots=True)
class ShardDocument:
    """A document's stored fields as the shard has them, and the operation that stored them."""

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, MetadataValue]
    vector: Vector | None = None
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """A live document that matches a filter, and the operation that stored it."""

    id: str
    seq: int


@dataclass(frozen=True, slots=True)
class ShardStanding:
    """How one shard stands on one host; *failure* is why it fell behind, if it did."""

    shard: int
    applied_seq: int
    documents: int
    rows: int = 0
    segments: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    disk_bytes: int = 0
    snapshot_seq: int = 0
    catching_up: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit of one shard against the ledger found, by kind of difference, and how many were mended."""

    shard: int
    applied_seq: int
    documents: int
    differences: Mapping[str, Sequence[str]]
    repaired: int = 0


class Shard(Protocol):
    """One hash slice of a collection, derived from the ledger up to `applied_seq`."""

    @property
    def number(self) -> int:
        """Which slice this is."""
        ...

    @property
    def applied_seq(self) -> int:
        """The last operation of the collection that this shard has seen, whether or not it was for this slice."""
        ...

    @property
    def documents(self) -> int:
        """How many live documents it holds."""
        ...

    async def apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        """
        Take *operations* (of this slice, in order) and become true up to *applied_seq*.

        All of them become visible to searches together, before this returns. An operation numbered up to the present
        `applied_seq` is passed over, so repeating a call does no harm.
        """
        ...

    async def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        """Return this slice's document count and document frequencies of *terms*."""
        ...

    async def search(self, query: ShardQuery) -> ShardAnswer:
        """Return the best candidates of each retriever; an empty slice or an unmatched filter gives none."""
        ...

    async def fetch(self, ids: Sequence[str], *, vectors: bool = False) -> dict[str, ShardDocument]:
        """Return the live documents among *ids*, with their newest fields."""
        ...

    async def matching(self, filter: Any, *, limit: int) -> list[Match]:
        """Return up to *limit* live documents that match *filter*, in a fixed order."""
        ...

    async def aclose(self) -> None:
        """Free what it holds; searches under way finish first."""
        ...


class ShardHost(Protocol):
    """
    A place where shards live and follow the ledger: this process, or a shard node behind HTTP.

    A host is one replica of each shard that it hosts. Methods about a shard raise NotReady while it is not open,
    DependencyUnavailable or DeadlineExceeded where a node does not answer (in time), InvalidInput for a bad query.
    """

    @property
    def name(self) -> str:
        """How failures, metrics and logs call it."""
        ...

    async def statistics(
        self, collection: Collection, shard: int, terms: Sequence[str], deadline: Deadline
    ) -> LexicalStatistics:
        """See Shard.statistics."""
        ...

    async def search(self, collection: Collection, shard: int, query: ShardQuery, deadline: Deadline) -> ShardAnswer:
        """See Shard.search."""
        ...

    async def fetch(
        self, collection: Collection, shard: int, ids: Sequence[str], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        """See Shard.fetch."""
        ...

    async def matching(
        self, collection: Collection, shard: int, filter: Any, deadline: Deadline, *, limit: int
    ) -> list[Match]:
        """See Shard.matching."""
        ...

    async def wait_applied(self, collection: Collection, shard: int, seq: int, deadline: Deadline) -> bool:
        """Wait until the shard has applied *seq*; False when the deadline came first."""
        ...

    async def standings(self, collection: Collection, deadline: Deadline) -> list[ShardStanding]:
        """Say how each of the collection's shards that this host has stands."""
        ...

    async def audit(self, collection: Collection, shard: int, deadline: Deadline, *, repair: bool) -> AuditReport:
        """Compare the shard with the ledger, and mend it on request, while it answers."""
        ...

    async def snapshot(self, collection: Collection, shard: int, deadline: Deadline) -> int:
        """Write a snapshot of the shard now; return the operation number that it is true for."""
        ...

    def notify(self, collection: Collection, seq: int) -> None:
        """Say that the ledger has operations up to *seq* now."""
        ...

    async def forget(self, collection: Collection) -> None:
        """Close and remove the shards of a deleted collection."""
        ...

    async def aclose(self) -> None:
        """Stop following and close all shards, or the connections to the node."""
        ...
