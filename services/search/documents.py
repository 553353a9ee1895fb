"""What a model reads of a document, and the hashes that tell whether it has to read it again."""

import hashlib
from collections.abc import Mapping

import orjson

from services.common.wire.base import MAX_TEXT_CHARS
from services.search.ports import MetadataValue


def model_text(title: str | None, text: str) -> str:
    """
    Return what is embedded and reranked: the title, unless the text begins with it, then the text.

    Cut to what the model services take, which is far more than any model reads.
    """
    if not title or text.startswith(title):
        return text[:MAX_TEXT_CHARS]
    return f"{title}\n{text}"[:MAX_TEXT_CHARS] if text else title[:MAX_TEXT_CHARS]


def content_hash(text: str, title: str | None, metadata: Mapping[str, MetadataValue], own_vector: bytes) -> bytes:
    """Identify all that the owner gave: two documents with the same hash are the same to the letter."""
    body = orjson.dumps([text, title, dict(metadata), own_vector.hex()], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(body, digest_size=16).digest()


def embedded_hash(title: str | None, text: str, own_vector: bytes) -> bytes:
    """Identify what made the vector: the text a model read, or the caller's own vector."""
    return hashlib.blake2b(own_vector or model_text(title, text).encode(), digest_size=16).digest()
