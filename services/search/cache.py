"""The result cache: in this process, or in Redis when there is one."""

import sys
import time
from collections import OrderedDict

import orjson
import structlog

from services.common.key_value import KeyValueStore
from services.search.ports import CacheEntry

log = structlog.get_logger(__name__)

KEY_PREFIX = "tercet:result:"


class MemoryResultCache:
    """Least recently used goes first; bounded by bytes; entries live *ttl_s*."""

    def __init__(self, *, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[str, CacheEntry] = OrderedDict()
        self._bytes = 0

    @property
    def available(self) -> bool:
        """Memory always is."""
        return True

    async def get(self, key: str) -> CacheEntry | None:
        """See ResultCache."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if time.time() - entry.created_at > self._ttl_s:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    async def put(self, key: str, entry: CacheEntry) -> None:
        """See ResultCache; an entry over the whole bound is not kept."""
        self._drop(key)
        size = _size(key, entry)
        if size > self._max_bytes:
            return
        self._entries[key] = entry
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= _size(key, entry)

    async def aclose(self) -> None:
        """Nothing to close."""


def _size(key: str, entry: CacheEntry) -> int:
    return sys.getsizeof(key) + sys.getsizeof(entry.body) + 200


class RedisResultCache:
    """Entries in *store* with a time to live; while it fails, every call is a quick miss."""

    def __init__(self, store: KeyValueStore, *, ttl_s: float) -> None:
        self._store = store
        self._ttl_ms = int(ttl_s * 1000)

    @property
    def available(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._store.available

    async def get(self, key: str) -> CacheEntry | None:
        """See ResultCache; what cannot be read as an entry is a miss too."""
        raw = await self._store.attempt(lambda redis: redis.get(KEY_PREFIX + key))
        if not isinstance(raw, bytes):
            return None
        head, _, body = raw.partition(b"\n")
        try:
            as_of, created_at, epoch = orjson.loads(head)
            if not isinstance(epoch, str):
                raise TypeError("an epoch is a string")
            return CacheEntry(int(as_of), float(created_at), body, epoch)
        except (orjson.JSONDecodeError, ValueError, TypeError):
            log.warning("cache_entry_unreadable", key=key)
            return None

    async def put(self, key: str, entry: CacheEntry) -> None:
        """See ResultCache."""
        raw = orjson.dumps([entry.as_of, entry.created_at, entry.epoch]) + b"\n" + entry.body
        await self._store.attempt(lambda redis: redis.set(KEY_PREFIX + key, raw, px=self._ttl_ms))

    async def aclose(self) -> None:
        """Close connections."""
        await self._store.aclose()
