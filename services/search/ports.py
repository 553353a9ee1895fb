"""What the search service's use cases need from the outside: Protocols, and the values that pass through them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.deadline import Deadline

Vector = NDArray[np.float32]
MetadataValue = str | int | float | bool | list[str]


# --- the ledger ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Collection:
    """A named set of documents; *uuid* is never repeated, *fingerprint* names what made its vectors."""

    uuid: str
    name: str
    model: str | None
    fingerprint: str
    dim: int
    shards: int
    created_at: float


@dataclass(frozen=True, slots=True)
class CollectionState:
    """Where a collection's ledger stands: the last operation number, and how many documents are live."""

    seq: int
    documents: int


@dataclass(frozen=True, slots=True)
class LedgerDocument:
    """A document with its vector (float32, unit length, shape [dim]); *embedded_hash* identifies what the model read."""

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, MetadataValue]
    vector: Vector
    content_hash: bytes
    embedded_hash: bytes


@dataclass(frozen=True, slots=True)
class Operation:
    """One numbered change: the document as it now is, or None where it was deleted."""

    seq: int
    id: str
    document: LedgerDocument | None


@dataclass(frozen=True, slots=True)
class KnownDocument:
    """What the ledger already holds for an id: hashes to tell what changed, and the vector to keep."""

    content_hash: bytes
    embedded_hash: bytes
    vector: Vector


class Ledger(Protocol):
    """
    The system of record: documents, vectors and numbered operations.

    `append` returns only when its transaction is synced to disk. `seq` grows by one for each operation of a
    collection, without gaps, in commit order. All methods may be called concurrently.
    """

    @property
    def epoch(self) -> str:
        """Identity of this ledger's history; a restored or new ledger has another one."""
        ...

    async def create_collection(self, collection: Collection) -> None:
        """Add *collection*. Raises Conflict when the name is taken."""
        ...

    async def list_collections(self) -> list[Collection]:
        """Return all collections, by name."""
        ...

    async def find_collection(self, name: str) -> Collection | None:
        """Return the collection of that name, if there is one."""
        ...

    async def delete_collection(self, uuid: str) -> bool:
        """Remove a collection with all its documents; False when there was none."""
        ...

    async def append(self, uuid: str, upserts: Sequence[LedgerDocument]) -> int:
        """
        Store *upserts* in one transaction, an operation each, in order; return the last operation number.

        Raises:
            NotFound: The collection was deleted meanwhile.
        """
        ...

    async def delete(self, uuid: str, ids: Sequence[str]) -> tuple[int, int]:
        """Delete the documents of *ids* that exist; return (how many, the collection's last operation number)."""
        ...

    async def known(self, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
        """Return what is held for those of *ids* that are live."""
        ...

    async def documents(self, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
        """Return the live documents among *ids*."""
        ...

    async def operations_after(self, uuid: str, seq: int, *, limit: int) -> list[Operation]:
        """
        Return up to *limit* operations numbered above *seq*, in order.

        The log is compacted: of several operations on one document only the last is kept, so numbers may skip.
        """
        ...

    async def state(self, uuid: str) -> CollectionState:
        """Return the last operation number and the live count. Raises NotFound."""
        ...

    async def aclose(self) -> None:
        """Close the database; calls under way finish first."""
        ...


# --- shards -------------------------------------------------------------------------------------------------------


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
    so that BM25 scores of different shards compare. *filter* is a parsed expression of services/search/filters.py.
    """

    limit: int
    vector: Vector | None = None
    terms: Sequence[str] = ()
    statistics: LexicalStatistics | None = None
    filter: Any = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proposal: *dense* is the exact float32 cosine (whenever the query had a vector), *bm25* only if BM25 found it."""

    id: str
    shard: int
    row: int
    dense: float | None
    bm25: float | None


@dataclass(frozen=True, slots=True)
class ShardAnswer:
    """The union of both retrievers' best *limit*, in no order; *applied_seq* is what it was true for."""

    shard: int
    applied_seq: int
    candidates: Sequence[Candidate]
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardDocument:
    """A hit's stored fields, as of the row that was found."""

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, MetadataValue]
    vector: Vector | None = None


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

        All of them become visible to searches together, before this returns. Repeating operations does no harm.
        """
        ...

    async def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        """Return this slice's document count and document frequencies of *terms*."""
        ...

    async def search(self, query: ShardQuery) -> ShardAnswer:
        """Return the best candidates of each retriever; an empty slice or an unmatched filter gives none."""
        ...

    async def fetch(self, rows: Sequence[int], *, vectors: bool = False) -> dict[int, ShardDocument]:
        """Return the stored fields of *rows*; rows that were replaced or deleted meanwhile may be missing."""
        ...

    async def aclose(self) -> None:
        """Free what it holds; searches under way finish first."""
        ...


# --- retrieval over all shards of a collection ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RetrievalQuery:
    """What the pipeline asks of a collection; *text* is the caller's own words, analysed by the shards' analyser."""

    limit: int
    vector: Vector | None = None
    text: str | None = None
    filter: Any = None


@dataclass(frozen=True, slots=True)
class Retrieved:
    """
    All shards' candidates together, which shards they are from, and the lowest `applied_seq` among them.

    *terms* are the question's analysed words and *statistics* the whole collection's, where BM25 ran.
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


class Retriever(Protocol):
    """The shards of all collections, wherever they are."""

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        """Ask all shards side by side; those that fail or are late are reported, not raised."""
        ...

    async def fetch(
        self, collection: Collection, candidates: Sequence[Candidate], deadline: Deadline, *, vectors: bool = False
    ) -> dict[str, ShardDocument]:
        """Return the stored fields of *candidates* by id; those that are gone are missing."""
        ...

    def notify(self, collection: Collection, seq: int) -> None:
        """Say that the ledger has operations up to *seq* now, so that shards follow without waiting for a poll."""
        ...

    async def wait_applied(self, collection: Collection, seq: int, deadline: Deadline) -> bool:
        """Wait until every shard has applied *seq*; False when the deadline came first."""
        ...

    async def applied_seq(self, collection: Collection) -> int:
        """Return the lowest `applied_seq` of the collection's shards."""
        ...

    async def forget(self, collection: Collection) -> None:
        """Close and remove the shards of a deleted collection."""
        ...


# --- the other services ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """The model behind the embedding service."""

    name: str
    fingerprint: str
    dim: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors (float32, unit length, shape [n, dim]) in the order of the texts, and what made them."""

    vectors: NDArray[np.float32]
    model: EmbeddingModel


class EmbeddingClient(Protocol):
    """The embedding service, behind its breaker."""

    async def embed_query(self, text: str, deadline: Deadline) -> Embedded:
        """Embed one question in the `query` lane. Raises DependencyUnavailable or DeadlineExceeded."""
        ...

    async def embed_documents(self, texts: Sequence[str], deadline: Deadline) -> Embedded:
        """Embed documents in the `bulk` lane. Raises as embed_query does, and Overloaded."""
        ...

    async def model(self, deadline: Deadline) -> EmbeddingModel:
        """Describe the model. Raises as embed_query does."""
        ...


@dataclass(frozen=True, slots=True)
class Reranked:
    """A score from 0 to 1 for each text, None where the deadline came first; *model* says who scored."""

    scores: Sequence[float | None]
    model: str
    fingerprint: str


class RerankClient(Protocol):
    """The rerank service, behind its breaker."""

    async def rerank(self, query: str, texts: Sequence[str], deadline: Deadline) -> Reranked:
        """Score *texts*, the likeliest first. Raises DependencyUnavailable or DeadlineExceeded."""
        ...


# --- the result cache -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A stored answer (the reply's JSON), the operation number it is true for, and when it was made (Unix time)."""

    as_of: int
    created_at: float
    body: bytes


class ResultCache(Protocol):
    """Answers by key. Losing it, or any entry, is a miss and never an error."""

    async def get(self, key: str) -> CacheEntry | None:
        """Return the entry, if there is one; None also when the cache cannot be reached."""
        ...

    async def put(self, key: str, entry: CacheEntry) -> None:
        """Keep *entry* for a while; does nothing when the cache cannot be reached."""
        ...

    @property
    def available(self) -> bool:
        """False while the cache is known to be out of reach."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...
