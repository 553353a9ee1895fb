"""
Lets the ledger forget deletions that no follower needs any more.

An exclusive ledger has no followers but this process's: it is trimmed up to what the older snapshots of all their
shards hold, so that even a shard that falls back to that finds what it lacks. Nobody knows all followers of a shared
ledger, so time decides: deletions older than *after_s* are forgotten, and a follower that was away for longer begins
again from nothing. The clock begins with this process: one that is started more often than that never trims.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

import structlog

from services.common.errors import NotFound
from services.search.ports import Ledger
from services.search.shards.host import LocalHost

MARKS = 24  # how many times in *after_s* it is noted where the collections stand

_log = structlog.get_logger(__name__)


class Trimmer:
    """Trims *ledger*, in the background once started."""

    def __init__(self, ledger: Ledger, hosts: Sequence[LocalHost], *, interval_s: float, after_s: float) -> None:
        """Look every *interval_s*. *hosts* are this process's; every follower of an exclusive ledger must be among them."""
        self._ledger = ledger
        self._hosts = hosts
        self._interval_s = interval_s if ledger.exclusive else after_s / MARKS
        self._marks: dict[str, deque[int]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def trim(self) -> int:
        """Trim all collections once, and return how many deletions were forgotten."""
        trimmed = 0
        for collection in await self._ledger.list_collections():
            try:
                seq = await self._unneeded(collection.uuid)
                if seq > (await self._ledger.state(collection.uuid)).trimmed_seq:
                    trimmed += await self._ledger.trim(collection.uuid, seq)
            except NotFound:
                self._marks.pop(collection.uuid, None)
        return trimmed

    async def _unneeded(self, uuid: str) -> int:
        if self._ledger.exclusive:
            return min((host.kept_seq(uuid) for host in self._hosts), default=0)
        marks = self._marks.setdefault(uuid, deque(maxlen=MARKS + 1))
        marks.append((await self._ledger.state(uuid)).seq)
        return marks[0] if len(marks) == marks.maxlen else 0

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.trim()
            except Exception:
                _log.warning("ledger_not_trimmed", exc_info=True)
