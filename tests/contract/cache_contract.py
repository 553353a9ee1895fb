"""What every result cache must do, as tests: a subclass says how to open one."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from services.search.ports import CacheEntry, ResultCache


def make_entry(body: bytes = b'{"hits":[]}', *, as_of: int = 7) -> CacheEntry:
    """Return an entry made now."""
    return CacheEntry(as_of, time.time(), body)


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return uuid.uuid4().hex


class ResultCacheContract:
    """Inherit this, and give `open`."""

    async def open(self, *, ttl_s: float) -> ResultCache:
        """Return a cache whose entries live *ttl_s*."""
        raise NotImplementedError

    @pytest.fixture
    async def cache(self) -> AsyncIterator[ResultCache]:
        """A cache, closed at the end."""
        cache = await self.open(ttl_s=60.0)
        yield cache
        await cache.aclose()

    async def test_nothing_is_there_at_first(self, cache: ResultCache, key: str) -> None:
        """A key that was never put is a miss."""
        assert await cache.get(key) is None
        assert cache.available

    @pytest.mark.parametrize("body", [b"{}", b"", b"two\nlines\n", b"\x00\xff\n", b"x" * 100_000])
    async def test_what_is_put_comes_back(self, cache: ResultCache, key: str, body: bytes) -> None:
        """An entry comes back to the byte, with its operation number and its time, as often as it is asked for."""
        entry = make_entry(body, as_of=2**40)
        await cache.put(key, entry)
        assert await cache.get(key) == entry
        assert await cache.get(key) == entry

    async def test_the_last_one_put_counts(self, cache: ResultCache, key: str) -> None:
        """A second entry under a key replaces the first."""
        await cache.put(key, make_entry(b"old"))
        newer = make_entry(b"new", as_of=8)
        await cache.put(key, newer)
        assert await cache.get(key) == newer

    async def test_keys_are_apart(self, cache: ResultCache, key: str) -> None:
        """An entry is found under its own key alone."""
        await cache.put(key, make_entry())
        assert await cache.get(key[:-1]) is None
        assert await cache.get(key + "0") is None

    async def test_entries_die(self, key: str) -> None:
        """After its time to live an entry is a miss."""
        cache = await self.open(ttl_s=0.05)
        try:
            await cache.put(key, make_entry())
            async with asyncio.timeout(10):
                while await cache.get(key) is not None:
                    await asyncio.sleep(0.01)
            await cache.put(key, make_entry(b"again"))
            assert cache.available
        finally:
            await cache.aclose()

    async def test_concurrent_use(self, cache: ResultCache, key: str) -> None:
        """Many callers at once each get what was put under their key."""
        entries = {f"{key}{number}": make_entry(f"{number}".encode()) for number in range(50)}
        await asyncio.gather(*(cache.put(each, entry) for each, entry in entries.items()))
        found = await asyncio.gather(*(cache.get(each) for each in entries))
        assert found == list(entries.values())
