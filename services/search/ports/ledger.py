"""The ledger as the use cases and the shards need it, and the values that pass through it."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from services.search.ports.values import AttributeKind, MetadataValue, Metric, Vector

NO_DOCUMENT = 0  # As an expected `seq`: the document must not exist.


@dataclass(frozen=True, slots=True)
class Collection:
    """
    A named set of documents; *uuid* is never repeated, *fingerprint* names what made its vectors.

    *attributes* are the metadata fields that filters may name, with their kinds; None indexes every field as `any`.
    *language* chooses the analyser of its words.
    """

    uuid: str
    name: str
    model: str | None
    fingerprint: str
    dim: int
    shards: int
    created_at: float
    metric: Metric = "cosine"
    attributes: Mapping[str, AttributeKind] | None = None
    language: str = "english"


@dataclass(frozen=True, slots=True)
class CollectionState:
    """
    Where a collection's ledger stands: the last operation number, and how many documents are live.

    Deletions up to *trimmed_seq* have left the log: a follower below it that is not at 0 has to begin again.
    """

    seq: int
    documents: int
    trimmed_seq: int = 0


@dataclass(frozen=True, slots=True)
class LedgerDocument:
    """
    A document with its vector (float32, shape [dim], unit length where the metric is cosine).

    *embedded_hash* identifies what the model read. *seq* is the operation that stored it; 0 before it is stored.
    """

    id: str
    text: str
    title: str | None
    metadata: Mapping[str, MetadataValue]
    vector: Vector
    content_hash: bytes
    embedded_hash: bytes
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One numbered change: the document as it now is, or None where it was deleted."""

    seq: int
    id: str
    document: LedgerDocument | None


@dataclass(frozen=True, slots=True)
class KnownDocument:
    """What the ledger already holds for an id: hashes to tell what changed, the vector to keep, and its operation."""

    content_hash: bytes
    embedded_hash: bytes
    vector: Vector
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """
    What is kept of a write under its idempotency key: *digest* of what was asked, *body* to answer it again with.

    *seq* is the collection's last operation number after that write; the ledger fills it in.
    """

    key: str
    digest: bytes
    body: bytes
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """
    What a transaction did: the collection's last operation number after it, and how many documents it changed.

    *conflicts* are the ids that stood at another operation than expected, each with where it stood (0: it does not
    exist); nothing was done to them.
    """

    seq: int
    changed: int
    conflicts: Mapping[str, int] = field(default_factory=dict)


class Ledger(Protocol):
    """
    The system of record: documents, vectors and numbered operations.

    `append` and `delete` return only when their transaction is synced to disk. `seq` grows by one for each operation
    of a collection, without gaps, in commit order. All methods may be called concurrently, and raise Unavailable
    (retryable) while the database cannot be reached or written.
    """

    @property
    def epoch(self) -> str:
        """
        A token of the present stretch of this ledger's history.

        Every opening of an embedded ledger, and every restore or failover of a shared one, begins another stretch.
        """
        ...

    @property
    def exclusive(self) -> bool:
        """True where no other process can write: what was read once stays true until this process changes it."""
        ...

    async def shares_history(self, uuid: str, epoch: str, seq: int) -> bool:
        """
        Whether operations up to *seq* of a collection, read while *epoch* was the epoch, are this ledger's too.

        False for an epoch that this ledger does not know, and for a *seq* beyond where that stretch ended here: the
        ledger was restored to an earlier point, and what was derived from it has to be made again.
        """
        ...

    async def create_collection(self, collection: Collection) -> None:
        """Add *collection*. Raises Conflict when the name is taken, by a collection or by an alias."""
        ...

    async def list_collections(self) -> list[Collection]:
        """Return all collections, by name."""
        ...

    async def find_collection(self, name: str) -> Collection | None:
        """Return the collection of that name, or the one that the alias of that name means, if there is one."""
        ...

    async def delete_collection(self, uuid: str) -> bool:
        """Remove a collection with all its documents and aliases; False when there was none."""
        ...

    async def list_aliases(self) -> dict[str, str]:
        """Return all aliases, by name, each with the name of its collection."""
        ...

    async def set_aliases(self, changes: Mapping[str, str | None]) -> None:
        """
        Let each alias mean the collection named, or nothing for None; all changes or none become visible at once.

        Raises:
            NotFound: There is no such collection (an alias of an alias is none).
            Conflict: A collection has the alias's name.
        """
        ...

    async def append(
        self,
        uuid: str,
        upserts: Sequence[LedgerDocument],
        *,
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        """
        Store *upserts* (distinct ids) in one transaction, an operation each, in order.

        A document in *expected* is stored only while it stands at that operation (`NO_DOCUMENT`: does not exist);
        otherwise it is left alone and reported. *receipt* is kept in the same transaction.

        Raises:
            NotFound: The collection was deleted meanwhile.
            InvalidInput: A vector has not the collection's dimensions.
            Conflict: There is a receipt under that key already; nothing was done.
        """
        ...

    async def delete(
        self,
        uuid: str,
        ids: Sequence[str],
        *,
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        """Delete the documents of *ids* that exist; `changed` says how many. Otherwise as `append`."""
        ...

    async def find_receipt(self, uuid: str, key: str) -> Receipt | None:
        """Return what was kept under an idempotency key, for at least a day after its write."""
        ...

    async def known(self, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
        """Return what is held for those of *ids* that are live."""
        ...

    async def documents(self, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
        """Return the live documents among *ids*."""
        ...

    async def operations_after(self, uuid: str, seq: int, *, limit: int) -> list[Operation]:
        """
        Return up to *limit* operations numbered above *seq*, in order; none for a collection that is gone.

        The log is compacted: of several operations on one document only the last is kept, so numbers may skip.
        """
        ...

    async def state(self, uuid: str) -> CollectionState:
        """Return where the collection stands. Raises NotFound."""
        ...

    def heard_seq(self, uuid: str) -> int:
        """
        Return the last operation number of a collection as this process knows it, without asking the database.

        Exact where the ledger is exclusive; otherwise what was last read, written or announced. 0 if nothing was.
        """
        ...

    def heard_collections(self) -> AbstractSet[str]:
        """Return the uuids of the collections of which `heard_seq` knows; some may be deleted by now."""
        ...

    async def wait_for_news(self, timeout_s: float) -> None:
        """Return when another process has announced a change (of any collection) or *timeout_s* is over."""
        ...

    async def trim(self, uuid: str, seq: int) -> int:
        """Forget deletions numbered up to *seq* (and old receipts); return how many. Live documents always stay."""
        ...

    async def aclose(self) -> None:
        """Close the database; calls under way finish first, later ones raise NotReady."""
        ...
