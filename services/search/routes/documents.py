"""Documents: write, read, delete."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from services.common.http_errors import JsonRoute
from services.common.wire.base import DocumentId
from services.common.wire.documents import DeleteReply, StoredDocument, WriteReply, WriteRequest
from services.search.routes.request import Name, Wait, resources, write_deadline

router = APIRouter(route_class=JsonRoute)


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
