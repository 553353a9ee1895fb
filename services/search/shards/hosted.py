"""A collection that a host has open, and who is using it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.search.shards.follower import Follower, Slot
from services.search.shards.local import LocalShard


@dataclass(slots=True, eq=False)
class Hosted:
    """A collection that is open, how many calls are using it now, and when the last one did."""

    follower: Follower
    used_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def catching_up(self) -> bool:
        """Whether any of its shards is."""
        return any(slot.catching_up for slot in self.follower.slots.values())

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the collection open meanwhile."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.used_at = asyncio.get_running_loop().time()
            if not self.users:
                self.unused.set()

    @contextmanager
    def using(self, number: int) -> Iterator[tuple[Slot, LocalShard]]:
        """Keep the collection open while a shard is used. Raises NotReady while that is not open."""
        shard = self.follower.shard(number)
        with self.busy():
            yield self.follower.slots[number], shard
