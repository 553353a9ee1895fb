"""
The score cache: a scorer's own scores of documents, in this process and, where there is one, in a Redis that processes share.

A score depends on the scorer, on how much is read of a document, on the query and on the text: all are in its key.
"""

import asyncio
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence

from services.rerank.kept import KeptByBytes
from services.rerank.scores import RawScore, SharedBytes

KEY_BYTES = 20

# Magic with a version, tokens, passages, where the best passage begins and ends in the text (-1: not known), the score;
# little-endian.
_ENTRY = struct.Struct("<4sIIiid")
_MAGIC = b"TRS1"
_NOWHERE = -1


class ScoreKeys:
    """Keys of one scorer's scores; *identity* names all that they depend on beside the request."""

    def __init__(self, identity: str) -> None:
        self._identity = _part(identity.encode())

    def of(self, query: str, reading: str, texts: Sequence[bytes]) -> list[bytes]:
        """Return a key, KEY_BYTES long, for each of *texts*, given by their hashes; *reading* says what is read of them."""
        started = hashlib.blake2b(
            self._identity + _part(reading.encode()) + _part(query.encode()), digest_size=KEY_BYTES
        )
        keys = []
        for text in texts:
            digest = started.copy()
            digest.update(_part(text))
            keys.append(digest.digest())
        return keys


class ScoreCache:
    """Up to *max_bytes* of scores in memory, the least recently used going first; what is not there is asked of *shared*."""

    def __init__(self, max_bytes: int, shared: SharedBytes | None = None) -> None:
        self._kept: KeptByBytes[RawScore] = KeptByBytes(max_bytes)
        self._shared = shared

    async def get_many(self, keys: Sequence[bytes], patience_s: float | None = None) -> dict[bytes, RawScore]:
        """
        Return the scores there are by key, marked as cached; what cannot be read as a score is none.

        Others are waited for no longer than *patience_s*, None for as long as they take.
        """
        found = {key: score for key in keys if (score := self._kept.get(key)) is not None}
        lacking = [key for key in keys if key not in found]
        if self._shared is not None and lacking:
            for key, raw in zip(lacking, await found_within(self._shared, lacking, patience_s), strict=True):
                if (score := unpack(raw)) is not None:
                    self._kept.put(key, score)
                    found[key] = score
        return found

    def put_many(self, scores: Mapping[bytes, RawScore]) -> None:
        """Keep *scores*, which must be complete; returns at once."""
        for key, score in scores.items():
            self._kept.put(key, score._replace(cached=True))
        if self._shared is not None and scores:
            self._shared.put_later({key: pack(score) for key, score in scores.items()})


async def found_within(shared: SharedBytes, keys: Sequence[bytes], patience_s: float | None) -> list[bytes | None]:
    """Return what *shared* has for each of *keys*, nothing where it takes longer than *patience_s*."""
    try:
        async with asyncio.timeout(patience_s):
            return await shared.get_many(keys)
    except TimeoutError:
        return [None] * len(keys)


def pack(score: RawScore) -> bytes:
    """Return a complete *score* as bytes."""
    start, end = score.best_passage or (_NOWHERE, _NOWHERE)
    return _ENTRY.pack(_MAGIC, score.tokens, score.passages, start, end, score.raw)


def unpack(raw: bytes | None) -> RawScore | None:
    """Return the score that *raw* holds, marked as cached; None where it holds none: missing, cut short, or somebody else's."""
    if raw is None or len(raw) != _ENTRY.size or raw[:4] != _MAGIC:
        return None
    _, tokens, passages, start, end, score = _ENTRY.unpack(raw)
    if not math.isfinite(score) or not (start == end == _NOWHERE or 0 <= start <= end):
        return None
    return RawScore(score, tokens, passages, None if start == _NOWHERE else (start, end), cached=True)


def _part(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value
