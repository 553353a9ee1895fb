"""Changes to documents that are there: deletion by ids and by filter, metadata alone, and reading them back."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from services.common.deadline import Deadline
from services.common.errors import Conflict, DeadlineExceeded, InvalidInput, NotFound
from services.common.wire.documents import DeleteReply, PatchReply
from services.search.catalog import Catalog
from services.search.documents import MAX_ID_SHOWN, canonical, check_values, content_hash, embedded_hash
from services.search.filters import matches, parse_filter
from services.search.kinds import check_metadata
from services.search.ports import Collection, Ledger, LedgerDocument, MetadataValue, Retriever
from services.search.receipts import IdempotencyKey, find_answer

DELETE_BATCH = 1000
READ_BATCH = 256
PAGE_BATCHES = 20
ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Page:
    """Documents in the order of their last change, and the operation to go on after; None at the end."""

    documents: list[LedgerDocument]
    after: int | None


class Changes:
    """Takes documents out, changes their metadata, reads them. Acknowledged means: synced in the ledger."""

    def __init__(self, catalog: Catalog, ledger: Ledger, retriever: Retriever) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever

    async def get(self, name: str, document_id: str) -> LedgerDocument:
        """Return one document from the ledger. Raises NotFound."""
        collection = await self._catalog.get(name)
        return await self._document(collection, name, document_id)

    async def delete(
        self, name: str, ids: Sequence[str], deadline: Deadline, *, wait: bool, key: IdempotencyKey | None = None
    ) -> DeleteReply:
        """Delete the documents of *ids*; those that do not exist are passed over. Raises NotFound for the collection."""
        collection = await self._catalog.get(name)
        done = await find_answer(self._ledger, collection, key)
        if done is None:
            wanted = list(dict.fromkeys(ids))
            receipt = None
            if key is not None:
                present = await self._ledger.known(collection.uuid, wanted)
                receipt = key.receipt(orjson.dumps(len(present)))
            written = await self._ledger.delete(collection.uuid, wanted, receipt=receipt)
            deleted, seq = written.changed, written.seq
            if deleted:
                self._retriever.notify(collection, seq)
        else:
            deleted, seq = orjson.loads(done.body), done.seq
        applied = wait and await self._retriever.wait_applied(collection, seq, deadline)
        return DeleteReply(collection=name, deleted=deleted, seq=seq, applied=applied)

    async def delete_matching(
        self, name: str, filter: Any, deadline: Deadline, *, wait: bool, key: IdempotencyKey | None = None
    ) -> DeleteReply:
        """
        Delete the documents that match *filter*, batch after batch until none does; what was deleted stays so.

        A document that changes meanwhile is looked at again as it then is.

        Raises:
            InvalidInput: The filter is wrong, or empty: that would be every document.
            DependencyUnavailable, DeadlineExceeded: A shard did not answer (in time), so that some may be left.
        """
        collection = await self._catalog.get(name)
        done = await find_answer(self._ledger, collection, key)
        if done is not None:
            deleted, seq = orjson.loads(done.body), done.seq
        else:
            deleted, seq = await self._delete_matching(collection, filter, deadline)
            await self._keep(collection, key, orjson.dumps(deleted))
        applied = wait and await self._retriever.wait_applied(collection, seq, deadline)
        return DeleteReply(collection=name, deleted=deleted, seq=seq, applied=applied)

    async def _delete_matching(self, collection: Collection, filter: Any, deadline: Deadline) -> tuple[int, int]:
        expression = parse_filter(filter, collection.attributes)
        if expression is None:
            raise InvalidInput(
                "filter: an empty one matches every document; to delete all, delete the collection", param="filter"
            )
        seq = (await self._ledger.state(collection.uuid)).seq
        deleted = 0
        while True:
            if not await self._retriever.wait_applied(collection, seq, deadline):
                raise DeadlineExceeded(
                    f"The shards have not applied all writes yet; {deleted} documents were deleted, and others may match"
                )
            found = await self._retriever.matching(collection, expression, deadline, limit=DELETE_BATCH)
            if not found:
                return deleted, seq
            expected = {match.id: match.seq for match in found}
            written = await self._ledger.delete(collection.uuid, list(expected), expected=expected)
            self._retriever.notify(collection, written.seq)
            deleted, seq = deleted + written.changed, max(seq, written.seq)

    async def patch(
        self,
        name: str,
        document_id: str,
        changes: Mapping[str, MetadataValue | None],
        deadline: Deadline,
        *,
        if_seq: int | None,
        wait: bool,
        key: IdempotencyKey | None = None,
    ) -> PatchReply:
        """
        Set the metadata fields of *changes*, and remove those that are None; text and vector stay.

        Raises:
            NotFound: There is no such document.
            Conflict: It does not stand at *if_seq*.
            InvalidInput, TooLarge: The metadata that comes of it cannot be kept.
        """
        collection = await self._catalog.get(name)
        done = await find_answer(self._ledger, collection, key)
        if done is not None:
            changed, seq = bool(orjson.loads(done.body)), done.seq
        else:
            changed, seq = await self._patch(collection, name, document_id, changes, if_seq)
            await self._keep(collection, key, orjson.dumps(changed))
        applied = wait and await self._retriever.wait_applied(collection, seq, deadline)
        return PatchReply(collection=name, id=document_id, changed=changed, seq=seq, applied=applied)

    async def _patch(
        self,
        collection: Collection,
        name: str,
        document_id: str,
        changes: Mapping[str, MetadataValue | None],
        if_seq: int | None,
    ) -> tuple[bool, int]:
        for _ in range(ATTEMPTS):
            found = await self._document(collection, name, document_id)
            if if_seq is not None and found.seq != if_seq:
                raise Conflict(
                    f"if_seq: the document should stand at operation {if_seq}, but stands at {found.seq}",
                    param="if_seq",
                )
            made = _merged(found, changes)
            check_metadata(made.metadata, collection.attributes)
            if made.content_hash == found.content_hash:
                return False, found.seq
            written = await self._ledger.append(collection.uuid, [made], expected={document_id: found.seq})
            if not written.conflicts:
                self._retriever.notify(collection, written.seq)
                return True, written.seq
        raise Conflict(f"The document {document_id[:MAX_ID_SHOWN]!r} is being changed by others; try again", param="id")

    async def page(
        self, name: str, after: int, *, limit: int, filter: Any = None, collection: Collection | None = None
    ) -> Page:
        """
        Return up to *limit* documents that match *filter*, of those changed after operation *after*, in that order.

        A page may have fewer, or none, and not be the last. Raises NotFound, and InvalidInput for a wrong filter.
        """
        collection = collection or await self._catalog.get(name)
        expression = parse_filter(filter, collection.attributes)
        found: list[LedgerDocument] = []
        for _ in range(PAGE_BATCHES):
            operations = await self._ledger.operations_after(collection.uuid, after, limit=READ_BATCH)
            if not operations:
                return Page(found, None)
            for operation in operations:
                after = operation.seq
                document = operation.document
                if document is None or not matches(expression, document.metadata, collection.attributes):
                    continue
                found.append(document if document.seq else replace(document, seq=operation.seq))
                if len(found) == limit:
                    return Page(found, after)
        return Page(found, after)

    async def export(self, name: str, after: int, *, filter: Any = None) -> AsyncIterator[list[LedgerDocument]]:
        """
        Return all documents that match *filter* and changed after operation *after*, page by page.

        One that is changed while they are read comes again, as it then is. Raises as `page`, before the first page.
        """
        collection = await self._catalog.get(name)
        first = await self.page(name, after, limit=READ_BATCH, filter=filter, collection=collection)

        async def pages() -> AsyncIterator[list[LedgerDocument]]:
            page = first
            while True:
                yield page.documents
                if page.after is None:
                    return
                page = await self.page(name, page.after, limit=READ_BATCH, filter=filter, collection=collection)

        return pages()

    async def _keep(self, collection: Collection, key: IdempotencyKey | None, body: bytes) -> None:
        """Keep *body* to answer with again. What it answers does no harm when it is done twice, so it comes after."""
        if key is None:
            return
        try:
            await self._ledger.append(collection.uuid, [], receipt=key.receipt(body))
        except Conflict:
            if await find_answer(self._ledger, collection, key) is None:
                raise

    async def _document(self, collection: Collection, name: str, document_id: str) -> LedgerDocument:
        found = (await self._ledger.documents(collection.uuid, [document_id])).get(document_id)
        if found is None:
            raise NotFound(f"There is no document {document_id[:MAX_ID_SHOWN]!r} in {name!r}", param="id")
        return found


def _merged(document: LedgerDocument, changes: Mapping[str, MetadataValue | None]) -> LedgerDocument:
    """Return *document* with the metadata that comes of *changes*. Raises InvalidInput or TooLarge."""
    merged = {**document.metadata, **changes}
    metadata = check_values({name: value for name, value in merged.items() if value is not None})
    own = document.vector.astype("<f4").tobytes()
    if document.embedded_hash != embedded_hash(document.title, document.text, own):
        own = b""
    hashed = content_hash(document.text, document.title, canonical(metadata), own)
    return replace(document, metadata=metadata, content_hash=hashed)
