"""Documents: write, read, change, delete."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.common.direct_routes import parse_body
from services.common.errors import InvalidInput
from services.common.http_errors import JsonRoute
from services.common.wire.base import DocumentId
from services.common.wire.documents import (
    MAX_EXPORT_PAGE,
    MAX_REPORTED_ERRORS,
    MSGPACK,
    NDJSON,
    DeleteReply,
    DeleteRequest,
    Document,
    DocumentPage,
    MetadataPatch,
    PatchReply,
    StoredDocument,
    WriteReply,
    WriteRequest,
)
from services.common.wire.errors import ErrorBody
from services.search.documents import read_document
from services.search.ingest import Totals
from services.search.ports import LedgerDocument
from services.search.receipts import IdempotencyKey
from services.search.routes.request import IdempotencyHeader, Name, Wait, resources, write_deadline
from services.search.routes.streaming import (
    STREAMS,
    ProgressResponse,
    Write,
    content_type,
    pieces,
    refused_status,
    summary,
    wants_lines,
)

router = APIRouter(route_class=JsonRoute)

_ONE = Document.model_json_schema(ref_template="#/components/schemas/{model}")
_LIST = {"type": "object", "required": ["documents"], "properties": {"documents": {"type": "array", "items": _ONE}}}
_BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _LIST},
            NDJSON: {"schema": {**_ONE, "description": "One document a line, any number of lines."}},
            MSGPACK: {"schema": {**_ONE, "description": "Maps one after the other; `vector` may be float32 bytes."}},
        },
    }
}


@router.post(
    "/collections/{name}/documents",
    tags=["documents"],
    summary="Write documents",
    response_model=WriteReply,
    openapi_extra=_BODIES,
)
async def write_documents(
    request: Request, name: Name, wait: Wait = "applied", idempotency_key: IdempotencyHeader = None
) -> Response:
    """Add or replace documents, a list or a stream; the collection is created if need be."""
    if content_type(request.scope) in STREAMS:
        write = _stream(request, name, wait == "applied", idempotency_key)
        request_id = request.scope["tercet_request_id"]
        return (
            ProgressResponse(write, name, request_id)
            if wants_lines(request)
            else await summary(write, name, request_id)
        )
    content = await request.body()
    asked = parse_body(WriteRequest, content, request.scope)
    key = None if idempotency_key is None else IdempotencyKey.of(idempotency_key, [name.encode(), content])
    indexing, deadline = resources(request).indexing, write_deadline(request)
    items = [read_document(index, source) for index, source in enumerate(asked.documents)]
    collection, outcome = await indexing.write(name, items, deadline, key=key)
    applied = wait == "applied" and collection is not None and outcome.accepted > 0
    reply = WriteReply(
        collection=name,
        accepted=outcome.accepted,
        unchanged=outcome.unchanged,
        embedded=outcome.embedded,
        seq=outcome.seq,
        applied=applied and collection is not None and await indexing.applied(collection, outcome.seq, deadline),
        failed=len(outcome.errors),
        errors=list(outcome.errors[:MAX_REPORTED_ERRORS]),
    )
    return _written(request, reply)


def _written(request: Request, reply: WriteReply) -> Response:
    """Return *reply*, as an error where nothing was accepted."""
    body = reply.model_dump(exclude_none=True)
    if reply.accepted or not reply.errors:
        return Response(orjson.dumps(body), media_type="application/json")
    first = reply.errors[0]
    others = f" (and {reply.failed - 1} more)" if reply.failed > 1 else ""
    param = f"documents.{first.index}" + (f".{first.param}" if first.param else "")
    error = ErrorBody(
        code=first.code,
        message=f"documents.{first.index}{'.' if first.param else ': '}{first.message}{others}",
        type="invalid_request_error",
        param=param,
        request_id=request.scope["tercet_request_id"],
    )
    request.scope["tercet_error_code"] = first.code
    content = orjson.dumps({"error": error.model_dump(), **body})
    return Response(content, refused_status(first.code), media_type="application/json")


def _stream(request: Request, name: str, wait: bool, key: str | None) -> Write:
    arriving = STREAMS[content_type(request.scope)](pieces(request))
    ingest = resources(request).ingest

    async def write(on_batch: Any) -> Totals:
        return await ingest.run(name, arriving, lambda: write_deadline(request), wait=wait, key=key, on_batch=on_batch)

    return write


@router.get(
    "/collections/{name}/documents",
    tags=["documents"],
    summary="Export documents",
    response_model=DocumentPage,
    response_model_exclude_none=True,
)
async def export_documents(
    request: Request,
    name: Name,
    cursor: Annotated[str | None, Query(max_length=32, pattern=r"^\d+$")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_EXPORT_PAGE)] = 100,
    filter: Annotated[str | None, Query(description="A filter as JSON.")] = None,
    vector: Annotated[bool, Query()] = False,
) -> Response:
    """
    Return a page in the order of the last change; with `Accept: application/x-ndjson` all from the cursor on, a line each.

    A document that changes while they are read comes again. A page may be short and not the last: `cursor` says.
    """
    changes, after = resources(request).changes, int(cursor or 0)
    wanted = _filter(filter)
    if wants_lines(request):
        found = await changes.export(name, after, filter=wanted)
        return StreamingResponse(_lines(found, vector), media_type=NDJSON)
    page = await changes.page(name, after, limit=limit, filter=wanted)
    documents = [_shown(document, vector) for document in page.documents]
    made = DocumentPage(documents=documents, cursor=None if page.after is None else str(page.after))
    return Response(orjson.dumps(made.model_dump(exclude_none=True)), media_type="application/json")


async def _lines(pages: AsyncIterator[list[LedgerDocument]], vector: bool) -> AsyncIterator[bytes]:
    async for documents in pages:
        shown = (_shown(document, vector).model_dump(exclude_none=True) for document in documents)
        yield b"".join(orjson.dumps(line) + b"\n" for line in shown)


def _filter(source: str | None) -> Any:
    try:
        return None if source is None else orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"filter: is not valid JSON: {error.msg}", param="filter") from None


def _shown(document: LedgerDocument, vector: bool) -> StoredDocument:
    return StoredDocument(
        id=document.id,
        text=document.text,
        title=document.title,
        metadata=dict(document.metadata),
        vector=document.vector.tolist() if vector else None,
        seq=document.seq,
    )


@router.post("/collections/{name}/documents/delete", tags=["documents"], summary="Delete documents")
async def delete_documents(
    request: Request,
    name: Name,
    body: DeleteRequest,
    wait: Wait = "applied",
    idempotency_key: IdempotencyHeader = None,
) -> DeleteReply:
    """Delete the documents of a list of ids, or those that match a filter."""
    changes, deadline = resources(request).changes, write_deadline(request)
    key = _key(idempotency_key, name, body.model_dump_json())
    if body.ids is not None:
        return await changes.delete(name, body.ids, deadline, wait=wait == "applied", key=key)
    return await changes.delete_matching(name, body.filter, deadline, wait=wait == "applied", key=key)


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
    return _shown(await resources(request).changes.get(name, document_id), vector)


@router.patch("/collections/{name}/documents/{document_id:path}", tags=["documents"], summary="Change metadata")
async def patch_document(
    request: Request,
    name: Name,
    document_id: DocumentId,
    body: MetadataPatch,
    wait: Wait = "applied",
    idempotency_key: IdempotencyHeader = None,
) -> PatchReply:
    """Set the given metadata fields of one document, or remove those that are null; no model is asked."""
    return await resources(request).changes.patch(
        name,
        document_id,
        body.metadata,
        write_deadline(request),
        if_seq=body.if_seq,
        wait=wait == "applied",
        key=_key(idempotency_key, name, document_id, body.model_dump_json()),
    )


@router.delete("/collections/{name}/documents/{document_id:path}", tags=["documents"], summary="Delete a document")
async def delete_document(
    request: Request,
    name: Name,
    document_id: DocumentId,
    wait: Wait = "applied",
    idempotency_key: IdempotencyHeader = None,
) -> DeleteReply:
    """Delete one document; `deleted` is 0 when there was none."""
    return await resources(request).changes.delete(
        name,
        [document_id],
        write_deadline(request),
        wait=wait == "applied",
        key=_key(idempotency_key, name, document_id),
    )


def _key(name: str | None, *asked: str) -> IdempotencyKey | None:
    return None if name is None else IdempotencyKey.of(name, [part.encode() for part in asked])
