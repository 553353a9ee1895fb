"""How a document's fields become what a database keeps, whichever database it is."""

from typing import NamedTuple

import numpy as np
import orjson

from services.common.errors import InvalidInput, NotFound
from services.search.ports import LedgerDocument, Vector


class Encoded(NamedTuple):
    """A document's fields as bytes: text in UTF-8, metadata as JSON, the vector as little-endian float32."""

    id: bytes
    text: bytes
    title: bytes | None
    metadata: bytes
    vector: bytes
    content_hash: bytes
    embedded_hash: bytes


class StoredOperation(NamedTuple):
    """An operation as it is kept, its document's fields as in `Encoded`; of a deletion only *seq* and *id* are there."""

    seq: int
    id: bytes
    text: bytes | None
    title: bytes | None
    metadata: bytes | None
    vector: bytes | None
    content_hash: bytes | None
    embedded_hash: bytes | None


class StoredReceipt(NamedTuple):
    """A receipt as it is kept, its key in UTF-8; *written_at* is in seconds since 1970."""

    key: bytes
    digest: bytes
    body: bytes
    seq: int
    written_at: float


def encode(document: LedgerDocument, dim: int) -> Encoded:
    """Return *document* as it is kept. Raises InvalidInput for a vector of another dimension and for what is no Unicode."""
    if document.vector.shape != (dim,):
        raise InvalidInput(
            f"The vector of document {document.id!r} has shape {list(document.vector.shape)}, "
            f"and the collection holds vectors of {dim} numbers",
            param="vector",
        )
    try:
        return Encoded(
            document.id.encode(),
            document.text.encode(),
            None if document.title is None else document.title.encode(),
            orjson.dumps(dict(document.metadata)),
            document.vector.astype("<f4", copy=False).tobytes(),
            document.content_hash,
            document.embedded_hash,
        )
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidInput(f"Document {document.id!r} cannot be stored: {error}") from error


def decode_vectors(stored: bytes, count: int = 1) -> Vector:
    """Return *count* vectors of the same length that lie one after the other, shape [count, dim]."""
    vectors: Vector = np.frombuffer(stored, dtype="<f4").astype(np.float32, copy=False).reshape(count, -1)
    return vectors


def gone(uuid: str) -> NotFound:
    """Return the error of whoever works on a collection that is not there."""
    return NotFound(f"There is no collection with the uuid {uuid}: it may have been deleted meanwhile")
