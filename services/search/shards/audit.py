"""
Compares a shard with the ledger while it goes on answering and following, and mends what differs.

What is compared is what the shard had applied when the audit began. Documents that are written meanwhile are left out:
they are the follower's work, and newer than the pages that are compared.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from pyroaring import BitMap

from services.search.filters import Condition
from services.search.ports import LedgerDocument, Operation, ShardDocument
from services.search.shards.contents import ShardContents
from services.search.shards.lexical import analyze
from services.search.shards.slices import ledger_slice
from services.search.shards.view import ShardView

__all__ = ["Audit", "ledger_slice"]

_MAX_TERMS = 16  # A row that has this many of its document's words is taken to have been indexed whole.


class Audit:
    """One audit of one shard. Its methods take as long as a page has documents; call them in a thread."""

    def __init__(
        self, contents: ShardContents, applied_since: Callable[[], AbstractSet[str]], *, vectors: bool
    ) -> None:
        """
        Begin.

        *applied_since* returns the ids that were written since the audit began; *vectors* says whether the shard keeps
        the ledger's vectors as they are.
        """
        self.differences: dict[str, list[str]] = {}
        self._contents = contents
        self._applied_since = applied_since
        self._vectors = vectors
        self._base = contents.view
        self._seen = BitMap()
        self._reported: set[str] = set()

    def compare(self, page: Sequence[Operation]) -> list[Operation]:
        """Note what differs from the ledger's operations of *page*; return those that would mend it."""
        stored, view = self._contents.stored([operation.id for operation in page])
        row_of = {document.id: row for row, document in stored.items()}
        self._seen.update(row_of.values())
        wrong: dict[str, str] = {}
        good: dict[int, LedgerDocument] = {}
        for operation in page:
            row = row_of.get(operation.id)
            if operation.seq > self._base.applied_seq:
                continue
            kind = _difference(operation, row, stored, view)
            if kind is not None:
                wrong[operation.id] = kind
            elif operation.document is not None and row is not None:
                good[row] = operation.document
        for kind, rows in self._indexed(good, view).items():
            wrong.update((good[row].id, kind) for row in rows)
        applied = self._applied_since()
        mends = []
        for operation in page:
            kind = wrong.get(operation.id)
            if kind is not None and operation.id not in applied:
                self._note(kind, operation.id)
                mends.append(operation)
        return mends

    def mend(self, mends: Sequence[Operation]) -> int:
        """Mend what `compare` returned, except what was written since, and return how many. The writer's thread."""
        applied = self._applied_since()
        due = [operation for operation in mends if operation.id not in applied]
        self._contents.mend(due, BitMap())
        return len(due)

    def bury(self, rows: BitMap) -> int:
        """Remove *rows*, which `surplus` returned, and return how many. The writer's thread."""
        self._contents.mend([], rows)
        return len(rows)

    def surplus(self) -> BitMap:
        """Note what is here and not in the ledger, after all pages; return the rows that have to go."""
        contents = self._contents
        rows = contents.parts.store.rows()
        _, view = contents.stored([])
        applied = self._applied_since()
        gone = BitMap()
        for kind, part in (("surplus", self._base.live & view.live), ("store", rows - view.live)):
            unseen = list(part - self._seen)
            for row, id in zip(unseen, contents.parts.ids.get(unseen), strict=True):
                if id not in applied:
                    self._note(kind, id)
                    gone.add(row)
        return gone

    def _note(self, kind: str, id: str) -> None:
        if id not in self._reported:
            self._reported.add(id)
            self.differences.setdefault(kind, []).append(id)

    def _indexed(self, good: dict[int, LedgerDocument], view: ShardView) -> dict[str, list[int]]:
        """Return, by index, the rows of *good* that it has not, or has otherwise."""
        if not good:
            return {}
        names = view.ids.get(list(good))
        wrong = {
            "ids": [row for (row, document), id in zip(good.items(), names, strict=True) if id != document.id],
            "attributes": self._without_attributes(good, view),
            "lexical": [row for row, document in good.items() if not self._has_words(row, document, view)],
        }
        if self._vectors:
            found = view.vectors.get(np.array(list(good), np.int64))
            wrong["vector"] = [
                row
                for (row, document), vector in zip(good.items(), found, strict=True)
                if vector.tobytes() != np.ascontiguousarray(document.vector, np.float32).tobytes()
            ]
        return wrong

    def _has_words(self, row: int, document: LedgerDocument, view: ShardView) -> bool:
        terms = analyze(document.text, self._contents.collection.language)
        terms += analyze(document.title or "", self._contents.collection.language)
        some = list(dict.fromkeys(terms))[:_MAX_TERMS]
        return not some or bool(view.lexical.search(some, 1, allowed=BitMap([row]), match="all"))

    def _without_attributes(self, good: dict[int, LedgerDocument], view: ShardView) -> list[int]:
        kinds = self._contents.collection.attributes
        rows = BitMap(good)
        expected: dict[str, BitMap] = {}
        for row, document in good.items():
            for field in document.metadata:
                if kinds is None or field in kinds:
                    expected.setdefault(field, BitMap()).add(row)
        wrong = BitMap()
        for field, having in expected.items():
            wrong |= view.attributes.resolve(Condition(field, "$exists", True), rows) ^ having
        return list(wrong)


def _difference(operation: Operation, row: int | None, stored: dict[int, ShardDocument], view: ShardView) -> str | None:
    """Return what is wrong with what the store has for *operation*: a kind of difference, or None."""
    wanted = operation.document
    if row is None:
        return None if wanted is None else "missing"
    found = stored[row]
    if found.seq > operation.seq:
        return None
    if wanted is None:
        return "surplus"
    if found.seq < operation.seq:
        return "stale"
    if row not in view.live:
        return "missing"
    same = (found.text, found.title, dict(found.metadata)) == (wanted.text, wanted.title, dict(wanted.metadata))
    return None if same else "store"
