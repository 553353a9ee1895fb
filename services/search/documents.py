"""Documents on their way in: read one by one, what a model reads of them, and the hashes that tell what changed."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from services.common.errors import InvalidInput, TercetError, TooLarge
from services.common.wire.base import MAX_TEXT_CHARS, Metadata
from services.common.wire.documents import MAX_DIMENSIONS, MAX_METADATA_BYTES, DocumentError, DocumentFields
from services.search.ports import MetadataValue, Metric, Vector

MAX_LENGTH = 1e18  # Of a vector that is not scaled: its square, and that of a difference, are finite in float32.
MIN_LENGTH = 1e-12
UNIT_TOLERANCE = 5e-7  # More than rounding to float32 takes off or adds.
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_ID_SHOWN = 100

Given = Sequence[float] | bytes

_metadata: TypeAdapter[dict[str, MetadataValue]] = TypeAdapter(Metadata)


@dataclass(frozen=True, slots=True)
class Draft:
    """
    A document that is valid by itself; *index* is its place in the write.

    *vector* is the caller's own, of any dimension; *metadata_json* is the metadata in canonical form.
    """

    index: int
    id: str
    text: str
    title: str | None
    metadata: Mapping[str, MetadataValue]
    metadata_json: bytes
    vector: Given | None = None
    if_seq: int | None = None


def read_document(index: int, source: Any) -> Draft | DocumentError:
    """Return the document that *source*, parsed JSON or MessagePack, describes; or what is wrong with it."""
    if not isinstance(source, dict):
        return DocumentError(
            index=index, id=None, code=InvalidInput.code, message="a document is an object with id and text"
        )
    fields = dict(source)
    vector = fields.pop("vector", None)
    try:
        read = DocumentFields.model_validate(fields)
        if vector is not None and not isinstance(vector, (list, bytes)):
            raise InvalidInput("vector: must be a list of numbers, or little-endian float32 bytes", param="vector")
        encoded = canonical(read.metadata)
    except ValidationError as problem:
        return failure(index, source.get("id"), _first(problem))
    except TercetError as error:
        return failure(index, source.get("id"), error)
    return Draft(index, read.id, read.text, read.title, read.metadata, encoded, vector, read.if_seq)


def failure(index: int, document_id: object, error: TercetError, *, seq: int | None = None) -> DocumentError:
    """Return *error* as that of the document at *index*."""
    shown = document_id[:MAX_ID_SHOWN].encode(errors="replace").decode() if isinstance(document_id, str) else None
    return DocumentError(index=index, id=shown, code=error.code, message=error.message, param=error.param, seq=seq)


def check_values(metadata: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return *metadata* if it can be stored. Raises InvalidInput, naming the field."""
    try:
        return _metadata.validate_python(dict(metadata), strict=True)
    except ValidationError as problem:
        raise _first(problem, "metadata") from None


def canonical(metadata: Mapping[str, MetadataValue]) -> bytes:
    """Return *metadata* as JSON with sorted keys. Raises TooLarge over 256 KiB."""
    encoded = orjson.dumps(dict(metadata), option=orjson.OPT_SORT_KEYS)
    if len(encoded) > MAX_METADATA_BYTES:
        raise TooLarge(
            f"metadata: is {len(encoded):,} bytes of JSON; the limit is {MAX_METADATA_BYTES:,}", param="metadata"
        )
    return encoded


def own_vector(given: Given, dim: int | None, metric: Metric, param: str = "vector") -> Vector:
    """
    Return a caller's own vector as float32: at unit length for the metric cosine, else as it is.

    A vector of unit length comes back to the bit, so that what was read from a ledger can be written again.

    *given* is a sequence of numbers or little-endian float32 bytes. Raises InvalidInput, naming *param*, for a wrong
    dimension, values that are no finite float32 numbers, one without direction (cosine), or one over 1e18 long.
    """
    exact = _numbers(given, param)
    if not 1 <= len(exact) <= MAX_DIMENSIONS:
        raise InvalidInput(f"{param}: must have 1 to {MAX_DIMENSIONS:,} dimensions", param=param)
    if dim is not None and len(exact) != dim:
        raise InvalidInput(f"{param}: has {len(exact)} dimensions; this collection has {dim}", param=param)
    finite = float(np.abs(exact).max()) <= FLOAT32_MAX
    length = float(np.dot(exact, exact)) ** 0.5 if finite else np.inf  # In float64, which these cannot overflow.
    if metric == "cosine":
        if not MIN_LENGTH <= length < np.inf:
            raise InvalidInput(f"{param}: must have finite float32 values that are not all zero", param=param)
        is_unit = abs(length - 1.0) < UNIT_TOLERANCE
        return np.asarray(exact if is_unit else exact / length, dtype=np.float32)
    if not length <= MAX_LENGTH:
        raise InvalidInput(f"{param}: must have finite values, and a length of at most {MAX_LENGTH:g}", param=param)
    return exact.astype(np.float32)


def _numbers(given: Given, param: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(given, bytes):
        if len(given) % 4:
            raise InvalidInput(f"{param}: bytes must be little-endian float32 values of four bytes", param=param)
        return np.frombuffer(given, dtype="<f4").astype(np.float64)
    try:
        # Several times faster than a check of each number, and it takes neither strings nor lists.
        return np.frombuffer(array("d", given))
    except (TypeError, OverflowError, ValueError):
        raise InvalidInput(f"{param}: must be a list of finite numbers", param=param) from None


def model_text(title: str | None, text: str) -> str:
    """
    Return what is embedded and reranked: the title, unless the text begins with it, then the text.

    Cut to what the model services take, which is far more than any model reads.
    """
    if not title or text.startswith(title):
        return text[:MAX_TEXT_CHARS]
    return f"{title}\n{text}"[:MAX_TEXT_CHARS] if text else title[:MAX_TEXT_CHARS]


def content_hash(text: str, title: str | None, metadata_json: bytes, own: bytes) -> bytes:
    """Identify all that the owner gave: two documents with the same hash are the same to the letter."""
    made = hashlib.blake2b(orjson.dumps([text, title, len(metadata_json)]), digest_size=16)
    made.update(metadata_json)
    made.update(own)
    return made.digest()


def embedded_hash(title: str | None, text: str, own: bytes) -> bytes:
    """Identify what made the vector: the text a model read, or the caller's own vector."""
    return hashlib.blake2b(own or model_text(title, text).encode(), digest_size=16).digest()


def _first(problem: ValidationError, *inside: str) -> InvalidInput:
    """Return the first thing wrong with a document as an error that names the field."""
    item = problem.errors(include_url=False, include_input=False)[0]
    known = [part for part in (*inside, *item["loc"]) if part != "[key]"]
    param = ".".join(str(part)[:MAX_ID_SHOWN] for part in known).encode(errors="replace").decode() or None
    message = "is not a known field" if item["type"] == "extra_forbidden" else item["msg"]
    return InvalidInput(f"{param}: {message}" if param else message, param=param)
