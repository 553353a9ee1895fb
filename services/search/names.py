"""Names of collections as this process last read them, which serve on while the ledger cannot be reached."""

import asyncio
import time
from collections.abc import Callable

from services.common.errors import Unavailable
from services.search.ports import Collection, Ledger

FRESH_S = 1.0
WAIT_S = 0.25


class KnownNames:
    """
    A name or an alias to its collection.

    Where another process may write to the ledger, a name is read again after FRESH_S. While that takes longer than
    WAIT_S, for which it is waited for, or fails, what was known is the answer.
    """

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._known: dict[str, tuple[Collection, float]] = {}
        self._reading: dict[str, tuple[asyncio.Task[Collection | None], float]] = {}  # with when it began
        self._changes = 0

    async def find(self, name: str) -> Collection | None:
        """Return the collection, if there is one. Raises Unavailable for one not known, while the ledger is away."""
        known = self._known.get(name)
        if known is not None and (self._ledger.exclusive or self._clock() - known[1] < FRESH_S):
            return known[0]
        under_way = self._reading.get(name)
        if under_way is None:
            under_way = self._reading[name] = asyncio.create_task(self._read(name)), self._clock()
            under_way[0].add_done_callback(lambda done: self._read_done(name, done))
        reading, began = under_way
        if known is None:
            return await asyncio.shield(reading)
        patience_s = began + WAIT_S - self._clock()
        if patience_s > 0:
            await asyncio.wait({reading}, timeout=patience_s)
        if not reading.done():
            return known[0]
        try:
            return reading.result()
        except Unavailable:
            self._known[name] = (known[0], self._clock())
            return known[0]

    def put(self, name: str, collection: Collection) -> None:
        """Remember a collection that this process made."""
        self._changes += 1
        self._known[name] = (collection, self._clock())

    def forget(self) -> None:
        """Forget all names, since this process changed what they mean; what is being read meanwhile is not kept."""
        self._changes += 1
        self._known.clear()
        self._reading.clear()

    async def _read(self, name: str) -> Collection | None:
        before = self._changes
        found = await self._ledger.find_collection(name)
        if before == self._changes:
            if found is None:
                self._known.pop(name, None)
            else:
                self._known[name] = (found, self._clock())
        return found

    def _read_done(self, name: str, reading: asyncio.Task[Collection | None]) -> None:
        if name in self._reading and self._reading[name][0] is reading:
            del self._reading[name]
        if not reading.cancelled():
            reading.exception()  # Whoever waits sees it; nobody may.
