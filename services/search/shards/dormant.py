"""The collections that a host does not have open: where their shards stand, and which of them the ledger is ahead of."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice

from services.common.errors import NotFound
from services.search.ports import Collection, Ledger, ShardStanding
from services.search.shards.directory import ShardDirectory

DOUBTED_AT_ONCE = 10  # closed collections whose state is read at each look, in turn: news may have been missed


class Dormant:
    """
    What a host knows of the collections of *ledger* that it has closed or never opened.

    *numbers* says which shards of a collection are the host's; *awake*, whether a collection is open (or about to be),
    or deleted: such are not taken in.
    """

    def __init__(
        self,
        ledger: Ledger,
        directory: ShardDirectory,
        numbers: Callable[[Collection], Sequence[int]],
        awake: Callable[[str], bool],
        *,
        look_every_s: float,
    ) -> None:
        """Know of nothing yet; `look` for new collections every *look_every_s*."""
        self._ledger = ledger
        self._directory = directory
        self._numbers = numbers
        self._awake = awake
        self._look_every_s = look_every_s
        self._closed: dict[str, tuple[Collection, list[ShardStanding]]] = {}
        self._absent: set[str] = set()
        self._look_at = 0.0

    def put(self, collection: Collection, standings: list[ShardStanding]) -> None:
        """Take in a collection that was closed, its shards standing like that."""
        self._closed[collection.uuid] = (collection, standings)

    def drop(self, uuid: str) -> None:
        """Leave out a collection that is open or deleted."""
        self._closed.pop(uuid, None)

    def standings(self, uuid: str) -> list[ShardStanding] | None:
        """Return how the shards of a collection stand; None where it is not here, or is not where the ledger is."""
        return self._closed[uuid][1] if uuid in self._closed and self._is_current(uuid) else None

    def collections(self) -> list[Collection]:
        """Return those that have operations, the ones that are `behind` first."""
        behind = self.behind()
        return behind + [
            collection
            for uuid, (collection, _) in self._closed.items()
            if self._ledger.heard_seq(uuid) and self._is_current(uuid)
        ]

    def behind(self) -> list[Collection]:
        """Return those that stand elsewhere than the ledger is known to: they are to be opened."""
        return [
            collection
            for uuid, (collection, _) in self._closed.items()
            if self._ledger.heard_seq(uuid) and not self._is_current(uuid)
        ]

    async def learn(self, collection: Collection) -> None:
        """Take in a collection as its newest snapshots and the ledger have it. Raises what the ledger raises."""
        try:
            await self._ledger.state(collection.uuid)  # From here on `heard_seq` knows it.
        except NotFound:
            return
        standings = []
        for number in self._numbers(collection):
            kept = await asyncio.to_thread(self._directory.standing, collection, number)
            standings.append(kept or ShardStanding(number, 0, 0))
        if not self._awake(collection.uuid):
            self._closed.setdefault(collection.uuid, (collection, standings))

    async def look(self) -> list[Collection]:
        """
        Take in the collections that are new in the ledger: at once if one was announced, otherwise when it is time.

        Returns those that may be deleted, or have operations that were announced while nobody listened: the caller is to
        ask the ledger for their state. Raises what the ledger raises.
        """
        unknown = {uuid for uuid in self._ledger.heard_collections() - self._closed.keys() if not self._awake(uuid)}
        now = asyncio.get_running_loop().time()
        if unknown <= self._absent and now < self._look_at:
            return []
        before = dict(self._closed)
        listed = {collection.uuid: collection for collection in await self._ledger.list_collections()}
        self._absent = unknown - listed.keys()
        self._look_at = now + self._look_every_s
        for uuid, collection in listed.items():
            if uuid not in self._closed and not self._awake(uuid):
                await self.learn(collection)
        doubted = [uuid for uuid in before if uuid not in listed]
        for uuid in islice(before, DOUBTED_AT_ONCE):
            if uuid in self._closed:
                self._closed[uuid] = self._closed.pop(uuid)  # To the end: next time it is the others' turn.
                doubted.append(uuid)
        return [before[uuid][0] for uuid in dict.fromkeys(doubted) if uuid in self._closed]

    def _is_current(self, uuid: str) -> bool:
        heard = self._ledger.heard_seq(uuid)
        return all(standing.applied_seq == heard for standing in self._closed[uuid][1])
