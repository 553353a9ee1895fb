"""Shapes shared by everything that reads documents, and the one error a user's input can cause."""

from typing import Literal, NotRequired, TypedDict

MetadataValue = str | int | float | bool | list[str]
TextFormat = Literal["markdown", "rst", "html", "plain"]


class DocumentDict(TypedDict):
    """A document as the search service takes it; a missing title or vector is an absent key, never None."""

    id: str
    text: str
    title: NotRequired[str]
    metadata: dict[str, MetadataValue]
    vector: NotRequired[list[float]]


class IngestError(Exception):
    """The user's files cannot be read as documents; the message names the file and the place in it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
