"""Answers that were given before: what makes two questions the same, and which answers are still true."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import orjson

from services.common.errors import Unavailable
from services.common.wire.search import CacheReply, SearchReply
from services.search.ports import CacheEntry, Ledger, ResultCache
from services.search.run import Run


class KeptAnswers:
    """The result cache; *settings* are those that decide an answer besides the request."""

    def __init__(self, cache: ResultCache, ledger: Ledger, settings: Sequence[Any]) -> None:
        self._cache = cache
        self._ledger = ledger
        self._settings = settings

    def key(self, run: Run) -> str | None:
        """
        Identify all that decides the answer but the collection's contents, which an entry's `as_of` stands for.

        None where the search passes the cache by: its caller said so, or wants to know how it is really searched.
        """
        if not run.request.cache or run.request.explain:
            return None
        asked = run.request.model_dump(exclude={"collection", "timeout_ms", "min_seq", "cache", "explain"})
        asked["include"] = sorted(asked["include"])
        parts = [run.collection.uuid, run.collection.fingerprint, asked, self._settings]
        return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=20).hexdigest()

    async def find(self, run: Run, key: str) -> SearchReply | None:
        """Return the answer kept under *key* if the collection has not moved since."""
        with run.timed("cache"):
            entry = await self._cache.get(key)
        if not self._cache.available:
            run.degrade("cache_unavailable")
        if entry is None or entry.as_of < run.seq or not await self._is_history(run, entry):
            return None
        try:
            reply = SearchReply.model_validate(orjson.loads(entry.body))
        except ValueError:  # Another version of this program wrote it.
            return None
        age_ms = max(0, int((time.time() - entry.created_at) * 1000))
        return reply.model_copy(update={"cache": CacheReply(hit=True, age_ms=age_ms)})

    async def keep(self, run: Run, key: str, reply: SearchReply) -> None:
        """Keep *reply* if it is whole, and true for all that the ledger is known to have."""
        if not run.degraded and reply.as_of >= run.seq:
            body = reply.model_dump_json(exclude_none=True).encode()
            await self._cache.put(key, CacheEntry(reply.as_of, time.time(), body, run.epoch))

    async def _is_history(self, run: Run, entry: CacheEntry) -> bool:
        """Whether the operations that *entry* is true for are still the ledger's, which a restore may have changed."""
        if entry.epoch == run.epoch:
            return True
        try:
            return await self._ledger.shares_history(run.collection.uuid, entry.epoch, entry.as_of)
        except Unavailable:
            return False
