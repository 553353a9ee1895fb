"""What a ledger should hold, as dictionaries, and the collections and documents that its tests write."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np

from services.search.ports import (
    NO_DOCUMENT,
    Collection,
    CollectionState,
    Ledger,
    LedgerDocument,
    Operation,
    Receipt,
    Written,
)

DIM = 4


def make_collection(name: str = "books", **changes) -> Collection:
    """Return a new collection with a uuid of its own."""
    made = Collection(str(uuid.uuid4()), name, "some/model", "fp-1", DIM, 2, time.time())
    return replace(made, **changes)


def make_document(id_: str, text: str = "text", **changes) -> LedgerDocument:
    """Return a document whose vector and hashes follow from its text."""
    random_numbers = np.random.default_rng(crc32(text.encode()))
    made = LedgerDocument(
        id=id_,
        text=text,
        title=None,
        metadata={"lang": "en", "pages": 12, "score": 0.5, "free": True, "tags": ["a", "b"]},
        vector=random_numbers.random(DIM, dtype=np.float32),
        content_hash=f"content of {text}".encode(),
        embedded_hash=f"embedded {text}".encode(),
    )
    return replace(made, **changes)


def same(left: LedgerDocument, right: LedgerDocument) -> bool:
    """Whether two documents are equal in every field but `seq`, vectors bit by bit."""
    plain = replace(left, vector=right.vector, seq=right.seq) == right
    return plain and left.vector.dtype == np.float32 and left.vector.tobytes() == right.vector.tobytes()


async def log(ledger: Ledger, collection: Collection, *, page: int = 1000) -> list[Operation]:
    """Return the whole operation log, read page by page."""
    operations: list[Operation] = []
    seq = 0
    while found := await ledger.operations_after(collection.uuid, seq, limit=page):
        assert len(found) <= page
        operations.extend(found)
        seq = found[-1].seq
    return operations


@dataclass
class Model:
    """What a ledger of one collection should hold; *last* is each document with the operation that left it so."""

    seq: int = 0
    last: dict[str, tuple[int, LedgerDocument | None]] = field(default_factory=dict)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    trimmed: int = 0

    def copy(self) -> "Model":
        return Model(self.seq, dict(self.last), dict(self.receipts), self.trimmed)

    def stands_at(self, id_: str) -> int:
        seq, document = self.last.get(id_, (NO_DOCUMENT, None))
        return NO_DOCUMENT if document is None else seq

    def append(
        self,
        documents: Sequence[LedgerDocument],
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        conflicts = self._conflicts([document.id for document in documents], expected)
        stored = [document for document in documents if document.id not in conflicts]
        for document in stored:
            self.seq += 1
            self.last[document.id] = (self.seq, document)
        return self._written(len(stored), conflicts, receipt)

    def delete(
        self, ids: Sequence[str], expected: Mapping[str, int] | None = None, receipt: Receipt | None = None
    ) -> Written:
        conflicts = self._conflicts(ids, expected)
        doomed = [id_ for id_ in dict.fromkeys(ids) if self.stands_at(id_) and id_ not in conflicts]
        for id_ in doomed:
            self.seq += 1
            self.last[id_] = (self.seq, None)
        return self._written(len(doomed), conflicts, receipt)

    def trim(self, seq: int) -> int:
        old = [(at, id_) for id_, (at, document) in self.last.items() if document is None and at <= seq]
        for _, id_ in old:
            del self.last[id_]
        self.trimmed = max([self.trimmed, *(at for at, _ in old)])
        return len(old)

    def _conflicts(self, ids: Sequence[str], expected: Mapping[str, int] | None) -> dict[str, int]:
        return {
            id_: self.stands_at(id_)
            for id_ in ids
            if (expected or {}).get(id_, self.stands_at(id_)) != self.stands_at(id_)
        }

    def _written(self, changed: int, conflicts: Mapping[str, int], receipt: Receipt | None) -> Written:
        if receipt is not None:
            self.receipts[receipt.key] = replace(receipt, seq=self.seq)
        return Written(self.seq, changed, conflicts)

    @property
    def live(self) -> dict[str, LedgerDocument]:
        return {id_: document for id_, (_, document) in self.last.items() if document is not None}

    async def check(self, ledger: Ledger, collection: Collection) -> None:
        """Assert that *ledger* holds this and nothing else."""
        state = await ledger.state(collection.uuid)
        assert state == CollectionState(self.seq, len(self.live), state.trimmed_seq)
        assert self.trimmed <= state.trimmed_seq <= self.seq
        operations = await log(ledger, collection, page=3)
        assert [(op.seq, op.id) for op in operations] == sorted((seq, id_) for id_, (seq, _) in self.last.items())
        for op in operations:
            expected = self.last[op.id][1]
            assert (op.document is None) == (expected is None)
            assert op.document is None or (same(op.document, expected) and op.document.seq == op.seq)
        documents = await ledger.documents(collection.uuid, list(self.last))
        known = await ledger.known(collection.uuid, list(self.last))
        assert documents.keys() == known.keys() == self.live.keys()
        assert all(same(documents[id_], document) for id_, document in self.live.items())
        assert all(documents[id_].seq == known[id_].seq == self.stands_at(id_) for id_ in documents)
        for receipt in self.receipts.values():
            assert await ledger.find_receipt(collection.uuid, receipt.key) == receipt
