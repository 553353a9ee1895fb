"""A small typed async client of the search service's HTTP API."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx2
import orjson
from pydantic import BaseModel, ValidationError

from services.common.wire.collections import CollectionList, CollectionReply
from services.common.wire.documents import DeleteReply, Document, StoredDocument, WriteReply
from services.common.wire.errors import ErrorBody, ErrorEnvelope
from services.common.wire.search import SearchReply, StatusReply
from tercet.errors import IndexingFailed, TercetApiError, TercetClientError, TercetUnreachable
from tercet.indexing import Indexing, IndexSummary, split_into_batches
from tercet.ingest import DocumentDict

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
_CONNECT_TIMEOUT_S = 5.0

Wait = Literal["applied", "acknowledged"]
Reply = TypeVar("Reply", bound=BaseModel)


class TercetClient:
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
        self.base_url = base_url.rstrip("/")
        self.key_headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        # Proxies are for the world outside; what this talks to is one's own.
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.base_url, headers=self.key_headers, transport=transport, trust_env=False
            )
        except httpx2.InvalidURL as error:
            raise TercetClientError(f"{self.base_url!r} is not an http address: {error}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def search(self, **fields: Any) -> SearchReply:
        """Ask a question; *fields* are those of SearchRequest, and those that are None are left to their defaults."""
        body = {name: value for name, value in fields.items() if value is not None}
        timeout_ms = body.get("timeout_ms")
        timeout_s = max(self._timeout_s, timeout_ms / 1000 + 5) if isinstance(timeout_ms, int) else self._timeout_s
        return await self._call("POST", "/search", SearchReply, body=body, timeout_s=timeout_s)

    async def write(
        self, collection: str, documents: Sequence[Document | DocumentDict], *, wait: Wait = "applied"
    ) -> WriteReply:
        """Write up to 1,000 documents as one batch, all or none; the collection is created where there is none."""
        body = {"documents": [_as_dict(document) for document in documents]}
        path = f"{_path(collection)}/documents"
        return await self._call("POST", path, WriteReply, body=body, params={"wait": wait})

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
        return await self._call("GET", f"{_path(collection)}/documents/{quote(document_id, safe='')}", StoredDocument)

    async def delete_document(self, collection: str, document_id: str) -> DeleteReply:
        """Delete a document; `deleted` is 0 when there was none."""
        return await self._call("DELETE", f"{_path(collection)}/documents/{quote(document_id, safe='')}", DeleteReply)

    async def create_collection(
        self, name: str, *, shards: int | None = None, dim: int | None = None
    ) -> CollectionReply:
        """Create an empty collection; *dim* is for one whose documents bring their own vectors."""
        fields = {"name": name, "shards": shards, "dim": dim}
        body = {field: value for field, value in fields.items() if value is not None}
        return await self._call("POST", "/collections", CollectionReply, body=body)

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

    async def status(self) -> StatusReply:
        """Return the collections, the state of what search depends on, and its cache."""
        return await self._call("GET", "/status", StatusReply)

    async def ready(self) -> bool:
        """Return whether the service takes requests; never raises for one that does not."""
        try:
            await self._send("GET", "/readyz", timeout_s=_CONNECT_TIMEOUT_S)
        except TercetClientError:
            return False
        return True

    async def _call(
        self,
        method: str,
        path: str,
        reply: type[Reply],
        *,
        body: object = None,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        content = await self._send(method, path, body=body, params=params, timeout_s=timeout_s)
        try:
            return reply.model_validate_json(content)
        except ValidationError:
            message = f"{self.base_url}{path} is not what Tercet answers; is this the search service's address?"
            raise TercetApiError(
                200, ErrorBody(code="unreadable_reply", message=message, type="server_error")
            ) from None

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        limit_s = timeout_s or self._timeout_s
        try:
            response = await self._http.request(
                method,
                path,
                params=params,
                content=_encode(body) if body is not None else None,
                headers={"content-type": "application/json"} if body is not None else None,
                timeout=httpx2.Timeout(limit_s, connect=min(limit_s, _CONNECT_TIMEOUT_S)),
            )
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise TercetUnreachable(self.base_url, "nothing listens there", refused=True) from None
        except httpx2.TimeoutException:
            raise TercetUnreachable(self.base_url, f"none within {limit_s:g} s", refused=False) from None
        except httpx2.UnsupportedProtocol as error:
            raise TercetClientError(f"{self.base_url!r} is not an http address: {error}") from None
        except httpx2.HTTPError as error:
            reason = f"the connection broke ({type(error).__name__})"
            raise TercetUnreachable(self.base_url, reason, refused=False) from None
        if not response.is_success:
            raise _api_error(response)
        return response.content


def _path(collection: str) -> str:
    return f"/collections/{quote(collection, safe='')}"


def _as_dict(document: Document | DocumentDict) -> dict[str, Any]:
    if isinstance(document, Document):
        return document.model_dump(exclude_none=True)
    return dict(document)


def _encode(body: object) -> bytes:
    try:
        return orjson.dumps(body, default=_plain)
    except TypeError as error:
        raise TercetClientError(f"the request cannot be written as JSON: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _api_error(response: httpx2.Response) -> TercetApiError:
    try:
        error = ErrorEnvelope.model_validate_json(response.content).error
    except ValidationError:
        retryable = response.status_code in (429, 502, 503, 504)
        message = f"{response.request.method} {response.request.url} was refused"
        error = ErrorBody(code="http_error", message=message, type="server_error", retryable=retryable)
    try:
        retry_after_s = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        retry_after_s = None
    return TercetApiError(response.status_code, error, retry_after_s=retry_after_s)
