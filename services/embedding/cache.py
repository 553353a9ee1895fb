"""The vector cache: in this process, or in Redis when there is one."""

import asyncio
import struct
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from services.common.key_value import KeyValueStore
from services.embedding.ports import CachedVector

KEY_PREFIX = b"tercet:vector:"
RECENT_S = 1.0
ENTRY_OVERHEAD_BYTES = 400  # What Python keeps for an entry besides the numbers.

# Magic with a version, whether the text was cut, the tokens read, the dimensions; then the numbers, little-endian float32.
_HEADER = struct.Struct("<4s?xxxII")
_MAGIC = b"TVC1"


class MemoryVectorCache:
    """Least recently used goes first; bounded by bytes; entries live *ttl_s*."""

    def __init__(self, *, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[bytes, tuple[float, CachedVector]] = OrderedDict()
        self._bytes = 0

    async def get_many(self, keys: Sequence[bytes]) -> list[CachedVector | None]:
        """See VectorCache; never waits."""
        now = time.monotonic()
        return [self._get(key, now) for key in keys]

    def _get(self, key: bytes, now: float) -> CachedVector | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= now:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry[1]

    async def put_many(self, entries: Mapping[bytes, CachedVector]) -> None:
        """See VectorCache; never waits."""
        for key, entry in entries.items():
            self.keep(key, entry)

    def keep(self, key: bytes, entry: CachedVector) -> None:
        """See VectorCache. An entry over the whole bound is not kept."""
        self._drop(key)
        size = _size(entry)
        if size > self._max_bytes:
            return
        # A copy: the vector is a row of a whole batch, which would stay in memory with it.
        kept = CachedVector(entry.vector.copy(), entry.tokens, entry.truncated)
        self._entries[key] = (time.monotonic() + self._ttl_s, kept)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= _size(entry[1])

    async def aclose(self) -> None:
        """Nothing to close."""


def _size(entry: CachedVector) -> int:
    return entry.vector.nbytes + ENTRY_OVERHEAD_BYTES


class RedisVectorCache:
    """Entries in *store* with a time to live; while it fails, every call is a quick miss. One round trip a call."""

    def __init__(self, store: KeyValueStore, *, ttl_s: float) -> None:
        self._store = store
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._recent: dict[bytes, CachedVector] = {}

    async def get_many(self, keys: Sequence[bytes]) -> list[CachedVector | None]:
        """See VectorCache; what cannot be read as an entry is a miss too."""
        if not keys:
            return []
        raw = await self._store.attempt(lambda redis: redis.mget([KEY_PREFIX + key for key in keys]))
        if raw is None:
            return [None] * len(keys)
        return [unpack(value) or self._recent.get(key) for key, value in zip(keys, raw, strict=True)]

    def keep(self, key: bytes, entry: CachedVector) -> None:
        """See VectorCache: for a moment, in this process, for those whose question Redis answered before it had the entry."""
        self._recent[key] = CachedVector(entry.vector.copy(), entry.tokens, entry.truncated)
        asyncio.get_running_loop().call_later(RECENT_S, self._recent.pop, key, None)

    async def put_many(self, entries: Mapping[bytes, CachedVector]) -> None:
        """See VectorCache."""

        async def run(redis: Any) -> bool:
            async with redis.pipeline(transaction=False) as pipeline:
                for key, entry in entries.items():
                    pipeline.set(KEY_PREFIX + key, pack(entry), px=self._ttl_ms)
                await pipeline.execute()
            return True

        if entries and not await self._store.attempt(run):
            for key in entries:
                self._recent.pop(key, None)

    async def aclose(self) -> None:
        """Close connections."""
        await self._store.aclose()


def pack(entry: CachedVector) -> bytes:
    """Return *entry* as bytes: a header of fixed size, then the numbers as little-endian float32."""
    header = _HEADER.pack(_MAGIC, entry.truncated, entry.tokens, len(entry.vector))
    return header + np.ascontiguousarray(entry.vector, dtype="<f4").tobytes()


def unpack(raw: bytes | str | None) -> CachedVector | None:
    """Return the entry that *raw* holds; None where it holds none: missing, cut short, or somebody else's."""
    if not isinstance(raw, bytes) or len(raw) < _HEADER.size or raw[:4] != _MAGIC:
        return None
    _, truncated, tokens, dim = _HEADER.unpack_from(raw)
    if not dim or len(raw) != _HEADER.size + 4 * dim:
        return None
    vector = np.frombuffer(raw, dtype="<f4", offset=_HEADER.size)
    return CachedVector(vector, tokens, truncated) if np.isfinite(vector).all() else None
