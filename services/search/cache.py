"""The result cache's two layers: in this process, and in a Redis that several processes share."""

import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import orjson
import structlog

from services.common.key_value import KeyValueStore
from services.search.ports import CacheEntry

log = structlog.get_logger(__name__)

KEY_PREFIX = "tercet:result:"
CLAIM_PREFIX = "tercet:making:"
COMPRESSED_BYTES = 1024
_ENTRY_OVERHEAD_BYTES = 200


class MemoryResultCache:
    """Least recently used goes first; bounded by bytes; entries live *ttl_s* from when their answers were made."""

    def __init__(
        self,
        *,
        max_bytes: int,
        ttl_s: float,
        max_entry_bytes: int | None = None,
        evicted: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Call *evicted* for each entry that goes for want of room."""
        self._max_bytes = max_bytes
        self._max_entry_bytes = max_bytes if max_entry_bytes is None else min(max_bytes, max_entry_bytes)
        self._ttl_s = ttl_s
        self._evicted = evicted
        self._clock = clock
        self._entries: OrderedDict[str, tuple[CacheEntry, float, int]] = OrderedDict()
        self._bytes = 0

    @property
    def available(self) -> bool:
        """Memory always is."""
        return True

    @property
    def used_bytes(self) -> int:
        """About how much memory the entries take."""
        return self._bytes

    @property
    def entries(self) -> int:
        """How many entries there are, dead ones that nobody asked for included."""
        return len(self._entries)

    async def get(self, key: str) -> CacheEntry | None:
        """See ResultCache."""
        found = self._entries.get(key)
        if found is None:
            return None
        entry, dies_at, _ = found
        if self._clock() > dies_at:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    async def put(self, key: str, entry: CacheEntry) -> None:
        """See ResultCache; an entry over its bound is not kept."""
        self._drop(key)
        size = sys.getsizeof(key) + sys.getsizeof(entry.body) + _ENTRY_OVERHEAD_BYTES
        if size > self._max_entry_bytes:
            return
        # The wall clock says how old the answer is, and no later jump of it lets the entry live longer.
        left_s = self._ttl_s - max(0.0, time.time() - entry.created_at)
        self._entries[key] = (entry, self._clock() + left_s, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
            self._evicted()

    def _drop(self, key: str) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            self._bytes -= found[2]

    async def aclose(self) -> None:
        """Nothing to close."""


class RedisResultCache:
    """
    Entries in *store* with a time to live, larger ones compressed; while it fails, every call is a quick miss.

    What comes back is checked (length and CRC) before it is believed. A Redis that takes no writes, for want of memory or
    as a replica, is read on.
    """

    def __init__(self, store: KeyValueStore, *, ttl_s: float, max_entry_bytes: int = 1 << 20) -> None:
        self._store = store
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._max_entry_bytes = max_entry_bytes

    @property
    def available(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._store.available

    async def get(self, key: str) -> CacheEntry | None:
        """See ResultCache; what cannot be read as an entry is a miss too."""
        return self._read(key, await self._store.attempt(lambda redis: redis.get(KEY_PREFIX + key)))

    async def put(self, key: str, entry: CacheEntry) -> None:
        """See ResultCache."""
        raw = self._written(entry)
        if raw is not None:
            await self._store.attempt(lambda redis: redis.set(KEY_PREFIX + key, raw, px=self._ttl_ms))

    async def claim(self, key: str, for_s: float) -> bool:
        """See SharedResultCache."""

        async def claimed(redis: Any) -> bool:
            return await redis.set(CLAIM_PREFIX + key, b"1", px=int(for_s * 1000), nx=True) is not None

        return await self._store.attempt(claimed) is not False

    async def extend(self, key: str, for_s: float) -> None:
        """See SharedResultCache."""
        await self._store.attempt(lambda redis: redis.pexpire(CLAIM_PREFIX + key, int(for_s * 1000)))

    async def settle(self, key: str, entry: CacheEntry | None) -> None:
        """See SharedResultCache; one round trip."""
        raw = None if entry is None else self._written(entry)

        async def settled(redis: Any) -> None:
            async with redis.pipeline(transaction=False) as pipeline:
                if raw is not None:
                    pipeline.set(KEY_PREFIX + key, raw, px=self._ttl_ms)
                pipeline.delete(CLAIM_PREFIX + key)
                await pipeline.execute()

        await self._store.attempt(settled)

    async def peek(self, key: str) -> tuple[CacheEntry | None, bool]:
        """See SharedResultCache."""
        found = await self._store.attempt(lambda redis: redis.mget(KEY_PREFIX + key, CLAIM_PREFIX + key))
        return (None, False) if found is None else (self._read(key, found[0]), found[1] is not None)

    async def aclose(self) -> None:
        """Close connections."""
        await self._store.aclose()

    def _written(self, entry: CacheEntry) -> bytes | None:
        body = entry.body
        if len(body) > self._max_entry_bytes:
            return None
        packed = zlib.compress(body, 1) if len(body) > COMPRESSED_BYTES else body
        head = [entry.as_of, entry.created_at, entry.epoch, len(body), zlib.crc32(body)]
        return orjson.dumps(head) + b"\n" + packed

    def _read(self, key: str, raw: object) -> CacheEntry | None:
        if not isinstance(raw, bytes):
            return None
        try:
            head, _, body = raw.partition(b"\n")
            as_of, created_at, epoch, size, checksum = orjson.loads(head)
            if type(as_of) is not int or type(created_at) is not float or type(epoch) is not str:
                raise TypeError("a field of the head has another type")
            if not 0 <= size <= self._max_entry_bytes:
                raise ValueError("it is too large")
            if size > COMPRESSED_BYTES:
                body = zlib.decompressobj().decompress(body, size + 1)
            if len(body) != size or zlib.crc32(body) != checksum:
                raise ValueError("it is not what was written")
        except (ValueError, TypeError, zlib.error) as error:
            log.warning("cache_entry_unreadable", key=key, error=str(error)[:200])
            return None
        return CacheEntry(as_of, created_at, body, epoch)
