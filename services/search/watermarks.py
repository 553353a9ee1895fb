"""How far the ledger has come: what an older answer must be true for before it may be given again."""

import asyncio

import structlog

from services.common.deadline import Deadline
from services.common.errors import TercetError
from services.search.ports import Collection, Ledger, Watermarks

log = structlog.get_logger(__name__)

WAIT_S = 0.1


def watermarks_of(ledger: Ledger) -> Watermarks:
    """Return the watermarks of *ledger*: known where this process alone writes to it, read where others do too."""
    return SoleWatermarks(ledger) if ledger.exclusive else SharedWatermarks(ledger)


class SoleWatermarks:
    """Watermarks of a ledger that no other process writes to: what this one has heard is all there is."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def read(self, collection: Collection, deadline: Deadline) -> int | None:
        """See Watermarks; asks nobody."""
        return self._ledger.heard_seq(collection.uuid)

    async def aclose(self) -> None:
        """Nothing to stop."""


class SharedWatermarks:
    """
    Watermarks of a ledger that others write to, read from the ledger itself.

    A write is acknowledged once it is committed, so a read that begins later sees it: no announcement has to arrive
    first, and none can be lost. All who ask while one read of a collection is under way share the next one. A search
    waits *wait_s* at most; while a read is late nobody waits, until it has ended one way or the other.
    """

    def __init__(self, ledger: Ledger, *, wait_s: float = WAIT_S) -> None:
        self._ledger = ledger
        self._wait_s = wait_s
        self._next: dict[str, asyncio.Future[int | None]] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._late: set[str] = set()

    async def read(self, collection: Collection, deadline: Deadline) -> int | None:
        """See Watermarks."""
        uuid = collection.uuid
        if uuid in self._late:
            return None
        waiting = self._next.get(uuid)
        if waiting is None:
            waiting = self._next[uuid] = asyncio.get_running_loop().create_future()
            if uuid not in self._reading:
                self._reading[uuid] = asyncio.create_task(self._read(uuid))
        done, _ = await asyncio.wait({waiting}, timeout=max(0.0, min(self._wait_s, deadline.remaining_s())))
        if done:
            return waiting.result()
        if uuid in self._reading and not deadline.passed:
            self._late.add(uuid)
        return None

    async def aclose(self) -> None:
        """Stop reading; those who wait know nothing."""
        for reading in list(self._reading.values()):
            reading.cancel()
        await asyncio.gather(*self._reading.values(), return_exceptions=True)

    async def _read(self, uuid: str) -> None:
        """Read for those who wait, then for those who came meanwhile, until nobody did."""
        try:
            while (waiting := self._next.pop(uuid, None)) is not None:
                seq: int | None = None
                try:
                    seq = (await self._ledger.state(uuid)).seq
                except TercetError as error:
                    log.debug("watermark_unknown", error=error.code)
                finally:
                    self._late.discard(uuid)
                    waiting.set_result(seq)
        finally:
            del self._reading[uuid]
