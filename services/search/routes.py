"""The HTTP routes: collections, documents, search and status."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request

from services.common.app import deadline_of, resources_of, service_of
from services.common.deadline import HEADER, Deadline
from services.common.http_errors import JsonRoute
from services.common.wire.base import CollectionName, DocumentId, QueryText
from services.common.wire.keys import KeyScope
from services.common.wire.search import (
    CollectionList,
    CollectionReply,
    CollectionRequest,
    DeleteReply,
    Mode,
    SearchReply,
    SearchRequest,
    StatusReply,
    StoredDocument,
    WriteReply,
    WriteRequest,
)
from services.search.resources import SearchResources
from services.search.settings import SearchSettings

router = APIRouter(route_class=JsonRoute)

Name = Annotated[CollectionName, Path(description="The collection's name.")]
Wait = Annotated[
    Literal["applied", "acknowledged"],
    Query(description="`applied`: reply once searches see it; `acknowledged`: once it is on disk."),
]


def resources(request: Request) -> SearchResources:
    """Return the search service's resources."""
    found = resources_of(request)
    assert isinstance(found, SearchResources)
    return found


def settings_of(request: Request) -> SearchSettings:
    """Return the search service's settings."""
    settings = service_of(request).settings
    assert isinstance(settings, SearchSettings)
    return settings


def search_deadline(request: Request, timeout_ms: int | None) -> Deadline:
    """Return when the search must be answered: its timeout_ms or the default, and the caller's header, whichever is first."""
    settings = settings_of(request)
    asked_ms = timeout_ms if timeout_ms is not None else settings.default_timeout_ms
    deadline = deadline_of(request) if HEADER in request.headers else Deadline()
    return deadline.at_most(min(asked_ms / 1000, settings.max_timeout_s))


def write_deadline(request: Request) -> Deadline:
    """Return when a write must be acknowledged."""
    return deadline_of(request) if HEADER in request.headers else Deadline.after(settings_of(request).write_timeout_s)


def scope_needed(method: str, path: str) -> KeyScope:
    """Return what an API key needs: `search` to ask and read, `write` to write, `admin` to delete a whole collection."""
    if method in ("GET", "HEAD", "OPTIONS") or not path.startswith("/collections"):
        return "search"
    return "admin" if method == "DELETE" and path.strip("/").count("/") < 2 else "write"


@router.post("/search", tags=["search"], summary="Search a collection", response_model_exclude_none=True)
async def search(request: Request, body: SearchRequest) -> SearchReply:
    """Answer a question; `degraded` and `coverage` say what the answer is worth."""
    deadline = search_deadline(request, body.timeout_ms)
    return await resources(request).pipeline.search(body, deadline, request_id=request.scope["tercet_request_id"])


@router.get("/search", tags=["search"], summary="Search, for people", response_model_exclude_none=True)
async def search_by_url(
    request: Request,
    q: Annotated[QueryText, Query(description="The question, as plain words.")],
    collection: Annotated[CollectionName | None, Query()] = None,
    k: Annotated[int, Query(ge=1, le=1000)] = 10,
    mode: Annotated[Mode, Query()] = "hybrid",
    rerank: Annotated[bool, Query()] = True,
) -> SearchReply:
    """The same search with its commonest options in the address."""
    return await search(request, SearchRequest(query=q, collection=collection, k=k, mode=mode, rerank=rerank))


@router.post("/collections", tags=["collections"], summary="Create a collection", status_code=201)
async def create_collection(request: Request, body: CollectionRequest) -> CollectionReply:
    """Create an empty collection for the embedding service's model (or, with `dim`, for the callers' own vectors)."""
    catalog = resources(request).catalog
    made = await catalog.create(body.name, write_deadline(request), shards=body.shards, dim=body.dim)
    return await catalog.describe(made)


@router.get("/collections", tags=["collections"], summary="List collections")
async def list_collections(request: Request) -> CollectionList:
    """List all collections with their sizes."""
    return CollectionList(collections=await resources(request).catalog.describe_all())


@router.get("/collections/{name}", tags=["collections"], summary="Describe a collection")
async def describe_collection(request: Request, name: Name) -> CollectionReply:
    """Describe one collection."""
    catalog = resources(request).catalog
    return await catalog.describe(await catalog.get(name))


@router.delete("/collections/{name}", tags=["collections"], summary="Delete a collection", status_code=204)
async def delete_collection(request: Request, name: Name) -> None:
    """Delete a collection with all its documents."""
    await resources(request).catalog.delete(name)


@router.post("/collections/{name}/documents", tags=["documents"], summary="Write documents")
async def write_documents(request: Request, name: Name, body: WriteRequest, wait: Wait = "applied") -> WriteReply:
    """Add or replace documents, all or none; the collection is created if need be."""
    indexing = resources(request).indexing
    return await indexing.write(name, body.documents, write_deadline(request), wait=wait == "applied")


@router.get(
    "/collections/{name}/documents/{document_id:path}",
    tags=["documents"],
    summary="Read a document",
    response_model_exclude_none=True,
)
async def get_document(
    request: Request, name: Name, document_id: DocumentId, vector: Annotated[bool, Query()] = False
) -> StoredDocument:
    """Return one document as it is kept in the ledger."""
    found = await resources(request).indexing.get(name, document_id)
    return StoredDocument(
        id=found.id,
        text=found.text,
        title=found.title,
        metadata=dict(found.metadata),
        vector=found.vector.tolist() if vector else None,
    )


@router.delete("/collections/{name}/documents/{document_id:path}", tags=["documents"], summary="Delete a document")
async def delete_document(request: Request, name: Name, document_id: DocumentId, wait: Wait = "applied") -> DeleteReply:
    """Delete one document; `deleted` is 0 when there was none."""
    indexing = resources(request).indexing
    return await indexing.delete(name, [document_id], write_deadline(request), wait=wait == "applied")


@router.get("/status", tags=["status"], summary="Collections, dependencies and cache")
async def status(request: Request) -> StatusReply:
    """Say how things stand; never asks another service, so it answers when they do not."""
    found = resources(request)
    dependencies: dict[str, dict[str, Any]] = {
        name: {"state": client.breaker.state, "url": client.base_url} for name, client in found.clients.items()
    }
    return StatusReply(
        version=request.app.version,
        collections=await found.catalog.describe_all(),
        dependencies=dependencies,
        cache={"kind": found.cache_kind, "available": found.cache.available},
    )
