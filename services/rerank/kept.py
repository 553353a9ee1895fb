"""Values in memory by key, bounded by bytes."""

import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A value that knows what it takes in memory."""

    @property
    def nbytes(self) -> int:
        """That many bytes, roughly."""
        ...


SizedT = TypeVar("SizedT", bound=Sized)


class KeptByBytes(Generic[SizedT]):
    """Values by key, up to *max_bytes* of them; the least recently used go first. Any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, SizedT] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> SizedT | None:
        """Return what is kept for *key*."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, value: SizedT) -> None:
        """Keep *value*, unless it alone is over the bound, or there is one for *key*."""
        with self._lock:
            if key in self._entries or value.nbytes > self._max_bytes:
                return
            self._entries[key] = value
            self._bytes += value.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1].nbytes

    def drain(self) -> list[tuple[bytes, SizedT]]:
        """Return all that is kept, the least recently used first, and keep it no longer."""
        with self._lock:
            entries, self._entries, self._bytes = self._entries, OrderedDict(), 0
            return list(entries.items())
