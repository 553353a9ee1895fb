"""A small typed async client of the search service's HTTP API."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx2

from services.common.wire.collections import (
    AliasList,
    AttributeKind,
    AuditReply,
    CollectionList,
    CollectionReply,
    CollectionStats,
    Metric,
    ReindexReply,
    SnapshotReply,
)
from services.common.wire.documents import (
    NDJSON,
    DeleteReply,
    Document,
    DocumentError,
    PatchReply,
    StoredDocument,
    Wait,
    WriteProgress,
    WriteReply,
)
from services.common.wire.search import BatchReply, SearchReply
from services.common.wire.status import StatusReply
from tercet.errors import IndexingFailed, TercetApiError, TercetClientError, TercetUnreachable
from tercet.indexing import Indexing, IndexSummary, in_background, split_into_batches
from tercet.ingest import DocumentDict
from tercet.transport import CONNECT_TIMEOUT_S, Transport, encode

__all__ = [
    "DEFAULT_URL",
    "IndexSummary",
    "IndexingFailed",
    "TercetApiError",
    "TercetClient",
    "TercetClientError",
    "TercetUnreachable",
]

DEFAULT_URL = "http://127.0.0.1:8000"
SLOW_TIMEOUT_S = 600.0
STREAM_PIECE = 64


class TercetClient(Transport):
    """
    The search service at *base_url*; use it as an async context manager, or close it with `aclose`.

    *api_key* is sent with every request, if there is one.

    Every method raises TercetApiError for an error answer and TercetUnreachable where there is none.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key=api_key, timeout_s=timeout_s, transport=transport)

    async def search(self, **fields: Any) -> SearchReply:
        """Ask a question; *fields* are those of SearchRequest, and those that are None are left to their defaults."""
        body = _given(fields)
        timeout_ms = body.get("timeout_ms")
        timeout_s = max(self._timeout_s, timeout_ms / 1000 + 5) if isinstance(timeout_ms, int) else self._timeout_s
        return await self._call("POST", "/search", SearchReply, body=body, timeout_s=timeout_s)

    async def search_batch(self, searches: Sequence[Mapping[str, Any]]) -> BatchReply:
        """
        Ask up to 100 questions in one request, each with the fields of SearchRequest; the results are in their order.

        A search that fails has its error in the reply. One that is malformed is a TercetApiError for all of them.
        """
        body = {"searches": [_given(search) for search in searches]}
        return await self._call("POST", "/search/batch", BatchReply, body=body, timeout_s=SLOW_TIMEOUT_S)

    async def write(
        self,
        collection: str,
        documents: Sequence[Document | DocumentDict],
        *,
        wait: Wait = "applied",
        idempotency_key: str | None = None,
    ) -> WriteReply:
        """
        Write up to 1,000 documents as one batch; the collection is created where there is none.

        Those that cannot be written are in the reply's `errors`; where none can be, that is a TercetApiError.
        """
        body = {"documents": [_as_dict(document) for document in documents]}
        path = f"{_path(collection)}/documents"
        headers = _key(idempotency_key)
        return await self._call("POST", path, WriteReply, body=body, params={"wait": wait}, headers=headers)

    async def stream(
        self,
        collection: str,
        documents: Iterable[Document | DocumentDict],
        *,
        wait: Wait = "applied",
        idempotency_key: str | None = None,
        on_progress: Callable[[WriteProgress], None] | None = None,
    ) -> WriteProgress:
        """
        Write any number of documents in one request, as fast as the service takes them and in bounded memory.

        *documents* is read in threads, so it may block. *on_progress* is told the totals so far, with the errors since
        the last time; returned are the totals at the end, with all errors. With an *idempotency_key* a stream that broke
        off can be sent again: what was acknowledged is passed over.

        Raises:
            TercetApiError: The stream was refused, or ended early; what was acknowledged before stays.
        """
        path = f"{_path(collection)}/documents"
        headers = {"content-type": NDJSON, **_key(idempotency_key)}
        content = (b"".join(map(_line, batch)) async for batch in in_background(documents, STREAM_PIECE))
        errors: list[DocumentError] = []
        last: WriteProgress | None = None
        async with self._lines("POST", path, content=content, params={"wait": wait}, headers=headers) as lines:
            async for line in lines:
                last = self._read(path, WriteProgress, line)
                errors += last.errors
                if on_progress is not None:
                    on_progress(last)
        if last is None or not (last.done or last.error):
            raise TercetUnreachable(self.base_url, "the answer to the stream broke off", refused=False)
        if last.error is not None:
            raise TercetApiError(200, last.error)
        return last.model_copy(update={"errors": errors})

    async def index(
        self,
        collection: str,
        documents: Iterable[Document | DocumentDict],
        *,
        batch_size: int = 64,
        concurrency: int = 2,
        retry_for_s: float = 60.0,
        on_batch: Callable[[IndexSummary], None] | None = None,
    ) -> IndexSummary:
        """
        Write any number of documents, holding no more than *concurrency* + 1 batches of them in memory.

        *documents* is read in threads, so it may block. A document replaces an earlier one of its id, as if they were
        written one by one. What a retry may mend is retried for *retry_for_s*. *on_batch* is told the running totals
        after each batch. When this raises, batches that were under way may or may not have been written.

        Raises:
            IndexingFailed: A batch was refused, or could not be written in time.
            TercetUnreachable: Nothing listens at the address, and nothing was written yet.
        """
        write = partial(self.write, collection)
        indexing = Indexing(write, concurrency=concurrency, retry_for_s=retry_for_s, on_batch=on_batch)
        return await indexing.run(split_into_batches(documents, batch_size))

    async def get_document(self, collection: str, document_id: str) -> StoredDocument:
        """Return a document as it is kept."""
        return await self._call("GET", _document_path(collection, document_id), StoredDocument)

    async def delete_document(self, collection: str, document_id: str) -> DeleteReply:
        """Delete a document; `deleted` is 0 when there was none."""
        return await self._call("DELETE", _document_path(collection, document_id), DeleteReply)

    async def delete_documents(
        self,
        collection: str,
        *,
        ids: Sequence[str] | None = None,
        filter: Mapping[str, Any] | None = None,
        wait: Wait = "applied",
    ) -> DeleteReply:
        """Delete the documents of *ids*, or those that match *filter*."""
        body = _given({"ids": None if ids is None else list(ids), "filter": filter})
        path = f"{_path(collection)}/documents/delete"
        return await self._call("POST", path, DeleteReply, body=body, params={"wait": wait})

    async def patch_document(
        self, collection: str, document_id: str, metadata: Mapping[str, Any], *, if_seq: int | None = None
    ) -> PatchReply:
        """Set the fields of *metadata*, and remove those that are None; text and vector stay."""
        body = {"metadata": dict(metadata)} | _given({"if_seq": if_seq})
        return await self._call("PATCH", _document_path(collection, document_id), PatchReply, body=body)

    async def export_documents(
        self, collection: str, *, filter: Mapping[str, Any] | None = None, vectors: bool = False
    ) -> AsyncIterator[StoredDocument]:
        """Yield all documents that match *filter*, in the order of their last change; one changed meanwhile comes again."""
        path = f"{_path(collection)}/documents"
        params = {"vector": "true" if vectors else "false"}
        if filter is not None:
            params["filter"] = encode(filter).decode()
        async with self._lines("GET", path, params=params) as lines:
            async for line in lines:
                yield self._read(path, StoredDocument, line)

    async def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        metric: Metric | None = None,
        dim: int | None = None,
        shards: int | None = None,
        attributes: Mapping[str, AttributeKind] | None = None,
        language: str | None = None,
    ) -> CollectionReply:
        """Create an empty collection; *dim* is for one whose documents bring their own vectors."""
        fields: dict[str, Any] = {"name": name, "model": model, "metric": metric, "dim": dim, "shards": shards}
        fields |= {"attributes": dict(attributes) if attributes is not None else None, "language": language}
        return await self._call("POST", "/collections", CollectionReply, body=_given(fields))

    async def collections(self) -> list[CollectionReply]:
        """Return all collections."""
        return (await self._call("GET", "/collections", CollectionList)).collections

    async def collection(self, name: str) -> CollectionReply:
        """Return one collection's identity and size."""
        return await self._call("GET", _path(name), CollectionReply)

    async def find_collection(self, name: str) -> CollectionReply | None:
        """Return one collection, or None if it does not exist."""
        try:
            return await self.collection(name)
        except TercetApiError as error:
            if error.status == 404 and error.code == "not_found":
                return None
            raise

    async def delete_collection(self, name: str) -> None:
        """Delete a collection and all that is in it."""
        await self._send("DELETE", _path(name))

    async def collection_stats(self, name: str) -> CollectionStats:
        """Return how a collection's ledger and its shards on every host stand."""
        return await self._call("GET", f"{_path(name)}/stats", CollectionStats)

    async def aliases(self) -> Mapping[str, str]:
        """Return every alias with the collection that it means."""
        return (await self._call("GET", "/aliases", AliasList)).aliases

    async def set_aliases(self, changes: Mapping[str, str | None]) -> Mapping[str, str]:
        """Let each alias mean a collection, or nothing for None, all at once; return all aliases."""
        return (await self._call("POST", "/aliases", AliasList, body={"changes": dict(changes)})).aliases

    async def reindex(self, source: str, target: str, **settings: Any) -> ReindexReply:
        """Begin to copy *source* into *target*; *settings* are those of ReindexRequest that are to differ."""
        body = _given({"target": target, **settings})
        return await self._call("POST", f"{_path(source)}/reindex", ReindexReply, body=body)

    async def reindex_progress(self, target: str) -> ReindexReply:
        """Return how the copy into *target* stands."""
        return await self._call("GET", f"{_path(target)}/reindex", ReindexReply)

    async def audit(self, name: str, *, repair: bool = False) -> AuditReply:
        """Compare a collection's shards with the ledger, and mend them on request; may take minutes."""
        params = {"repair": "true" if repair else "false"}
        return await self._call("POST", f"{_path(name)}/audit", AuditReply, params=params, timeout_s=SLOW_TIMEOUT_S)

    async def snapshot(self, name: str) -> SnapshotReply:
        """Let every host write snapshots of a collection's shards now."""
        return await self._call("POST", f"{_path(name)}/snapshot", SnapshotReply, timeout_s=SLOW_TIMEOUT_S)

    async def status(self) -> StatusReply:
        """Return the collections, the state of what search depends on, and its cache."""
        return await self._call("GET", "/status", StatusReply)

    async def ready(self) -> bool:
        """Return whether the service takes requests; never raises for one that does not."""
        try:
            await self._send("GET", "/readyz", timeout_s=CONNECT_TIMEOUT_S)
        except TercetClientError:
            return False
        return True


def _path(collection: str) -> str:
    return f"/collections/{_segment(collection)}"


def _document_path(collection: str, document_id: str) -> str:
    return f"{_path(collection)}/documents/{_segment(document_id)}"


def _segment(name: str) -> str:
    """Return *name* as one segment of a path; `.` and `..` too, which would otherwise be taken for steps up."""
    return name.replace(".", "%2E") if name in (".", "..") else quote(name, safe="")


def _as_dict(document: Document | DocumentDict) -> dict[str, Any]:
    if isinstance(document, Document):
        return document.model_dump(exclude_none=True)
    return dict(document)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _key(idempotency_key: str | None) -> dict[str, str]:
    return {} if idempotency_key is None else {"idempotency-key": idempotency_key}


def _line(document: Document | DocumentDict) -> bytes:
    return encode(_as_dict(document)) + b"\n"
