"""Shapes of documents: what their owner gives, and what a write answers."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from services.common.wire.base import DocumentId, LongText, Metadata, ReplyModel, RequestModel, Text, Vector

MAX_WRITE_BATCH = 1000


class Document(RequestModel):
    """A document as its owner gives it; with a *vector* of the collection's dimension no model is asked."""

    id: DocumentId
    text: LongText
    title: Text | None = None
    metadata: Metadata = Field(default_factory=dict)
    vector: Vector | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not self.text.strip() and not (self.title or "").strip():
            raise PydanticCustomError("blank", "text and title must not both be empty")
        return self


class WriteRequest(RequestModel):
    """Up to 1,000 documents, each id once; they replace documents of the same id."""

    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_WRITE_BATCH)]

    @model_validator(mode="after")
    def _distinct_ids(self) -> Self:
        first: dict[str, int] = {}
        for index, document in enumerate(self.documents):
            if document.id in first:
                raise PydanticCustomError(
                    "duplicate_id",
                    "repeats documents.{first}.id ({id})",
                    {"first": first[document.id], "id": repr(document.id[:80]), "param": f"documents.{index}.id"},
                )
            first[document.id] = index
        return self


class WriteReply(ReplyModel):
    """
    All of the batch is in the ledger, synced to disk, under operation numbers up to *seq*.

    *unchanged* documents were already there to the letter and made no operation; *embedded* is how many the model saw.
    """

    collection: str
    accepted: int
    unchanged: int
    embedded: int
    seq: int
    applied: bool


class DeleteReply(ReplyModel):
    """How many documents there were to delete, and the operation number after it."""

    collection: str
    deleted: int
    seq: int
    applied: bool


class StoredDocument(ReplyModel):
    """A document as it is kept."""

    id: str
    text: str
    title: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    vector: list[float] | None = None
