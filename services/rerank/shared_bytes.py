"""Bytes that rerank processes share through Redis: scores, and documents' token vectors."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from services.common.key_value import KeyValueStore

MAX_WAITING_BYTES: Final = 16 * 1024 * 1024
WRITE_BYTES: Final = 1024 * 1024  # A write so large is done well within the time that the store has for it.


class RedisBytes:
    """
    See SharedBytes: entries in *store* under *prefix* that live *ttl_s*. Use it in one event loop; `aclose` it before the store.

    While the store fails every look-up is a quick miss. Writes wait for nobody and nobody waits for them; over
    MAX_WAITING_BYTES of them are dropped.
    """

    def __init__(self, store: KeyValueStore, prefix: bytes, *, ttl_s: float) -> None:
        self._store = store
        self._prefix = prefix
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._writer: asyncio.Task[None] | None = None

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See SharedBytes."""
        if not keys:
            return []
        raw = await self._store.attempt(lambda redis: redis.mget([self._prefix + key for key in keys]))
        if raw is None:
            return [None] * len(keys)
        return [value if isinstance(value, bytes) else None for value in raw]

    def put_later(self, entries: Mapping[bytes, bytes]) -> None:
        """See SharedBytes."""
        for key, value in entries.items():
            if key not in self._waiting and self._waiting_bytes + len(value) <= MAX_WAITING_BYTES:
                self._waiting[key] = value
                self._waiting_bytes += len(value)
        if self._waiting and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._waiting:
            batch: dict[bytes, bytes] = {}
            size = 0
            for key in list(self._waiting):
                batch[key] = value = self._waiting.pop(key)
                size += len(value)
                if size >= WRITE_BYTES:
                    break
            self._waiting_bytes -= size
            if not await self._store.attempt(lambda redis, batch=batch: self._set(redis, batch)):  # type: ignore[misc]
                self._waiting.clear()
                self._waiting_bytes = 0

    async def _set(self, redis: Any, batch: Mapping[bytes, bytes]) -> bool:
        async with redis.pipeline(transaction=False) as pipeline:
            for key, value in batch.items():
                pipeline.set(self._prefix + key, value, px=self._ttl_ms)
            await pipeline.execute()
        return True

    async def aclose(self) -> None:
        """Write what waits."""
        if self._writer is not None:
            await self._writer
