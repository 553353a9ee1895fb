"""Shapes of documents: what their owner gives, and what a write answers."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from services.common.wire.base import (
    DocumentId,
    LongText,
    Metadata,
    MetadataKey,
    MetadataValue,
    ReplyModel,
    RequestModel,
    Text,
    Vector,
)
from services.common.wire.errors import ErrorBody

MAX_WRITE_BATCH = 1000
MAX_DIMENSIONS = 16_384
MAX_METADATA_BYTES = 256 * 1024
MAX_DOCUMENT_BYTES = 8 * 1024 * 1024
MAX_REPORTED_ERRORS = 1000
MAX_EXPORT_PAGE = 1000

NDJSON = "application/x-ndjson"
MSGPACK = "application/msgpack"

Wait = Literal["applied", "acknowledged"]


class DocumentFields(RequestModel):
    """A document as its owner gives it, without its vector; *if_seq* is where it must stand (0: it must not exist)."""

    id: DocumentId
    text: LongText
    title: Text | None = None
    metadata: Metadata = Field(default_factory=dict)
    if_seq: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not self.text.strip() and not (self.title or "").strip():
            raise PydanticCustomError("blank", "text and title must not both be empty")
        return self


class Document(DocumentFields):
    """A document as its owner gives it; with a *vector* of the collection's dimension no model is asked."""

    vector: Vector | None = None


class WriteRequest(RequestModel):
    """Up to 1,000 documents, each id once, which replace those of the same id. Each is judged by itself as a Document."""

    documents: Annotated[list[Any], Field(min_length=1, max_length=MAX_WRITE_BATCH)]


class DocumentError(ReplyModel):
    """Why one document of a write was left out: *index* counts from 0; *seq* is where it stands, for a conflict."""

    index: int
    id: str | None
    code: str
    message: str
    param: str | None = None
    seq: int | None = None


class WriteReply(ReplyModel):
    """
    The *accepted* documents are in the ledger, synced to disk, under operation numbers up to *seq*.

    *unchanged* documents were already there to the letter and made no operation; *embedded* is how many texts the model
    saw. *failed* documents were left out: *errors* says why, for the first 1,000.
    """

    collection: str
    accepted: int
    unchanged: int
    embedded: int
    seq: int
    applied: bool
    failed: int = 0
    errors: list[DocumentError] = Field(default_factory=list)


class WriteProgress(WriteReply):
    """
    A line of the reply to a stream: totals so far, and the *errors* since the line before.

    The last line is *done*, or has the *error* that ended the stream: what was accepted until then stays.
    """

    batches: int
    done: bool = False
    error: ErrorBody | None = None


class DeleteRequest(RequestModel):
    """Deletes the documents of *ids*, or those that match *filter*."""

    ids: Annotated[list[DocumentId], Field(min_length=1, max_length=MAX_WRITE_BATCH)] | None = None
    filter: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise PydanticCustomError("one_of", "give either ids or a filter", {"param": "ids"})
        return self


class DeleteReply(ReplyModel):
    """How many documents there were to delete, and the operation number after it."""

    collection: str
    deleted: int
    seq: int
    applied: bool


class MetadataPatch(RequestModel):
    """Changes the named metadata fields of one document (null removes one); text and vector stay."""

    metadata: Annotated[dict[MetadataKey, MetadataValue | None], Field(min_length=1, max_length=256)]
    if_seq: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None


class PatchReply(ReplyModel):
    """Where the document stands after a change of its metadata; *changed* is false where it was so already."""

    collection: str
    id: str
    changed: bool
    seq: int
    applied: bool


class StoredDocument(ReplyModel):
    """A document as it is kept; *seq* is the operation that stored it."""

    id: str
    text: str
    title: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    vector: list[float] | None = None
    seq: int = 0


class DocumentPage(ReplyModel):
    """Documents in the order of their last change; *cursor* asks for the next page, and is null after the last."""

    documents: list[StoredDocument]
    cursor: str | None = None
