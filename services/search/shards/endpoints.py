"""
Which addresses the shard nodes have.

Node *i* of *n* has the shards s with s mod n = i. A name that resolves to several addresses (a headless service) is as
many replicas; names are resolved again all the time, since connections that stay open would never find a new one.
"""

import asyncio
from collections.abc import Callable, Sequence

from services.common.addresses import RESOLVE_EVERY_S, Addresses
from services.search.shards.remote import RemoteHost
from services.search.shards.replicas import Replica


class _Address:
    """One URL of the settings, and a replica for every address that it now has."""

    def __init__(self, url: str, make: Callable[[str, str, str | None], RemoteHost]) -> None:
        self.url = url
        self._make = make
        self._addresses = Addresses(url)
        self._by_address: dict[str, Replica] = {}
        self._unresolved = Replica(make(url, url, None))
        self.replicas: tuple[Replica, ...] = (self._unresolved,)

    async def look(self) -> list[Replica]:
        """Resolve the name again, and return the replicas whose addresses are no longer its."""
        await self._addresses.look()
        addresses = self._addresses.known
        for address in addresses:
            if address not in self._by_address:
                named = self.url if len(addresses) == 1 else f"{self.url} ({address})"
                host = self._make(named, self._addresses.at(address), self._addresses.authority)
                self._by_address[address] = Replica(host)
        gone = [self._by_address.pop(address) for address in set(self._by_address) - set(addresses)]
        if self._by_address:
            self.replicas = tuple(self._by_address[address] for address in addresses)
        return gone

    async def aclose(self) -> None:
        """Look no more, and close all connections."""
        await self._addresses.aclose()
        for replica in (*self._by_address.values(), self._unresolved):
            await replica.host.aclose()


class Nodes:
    """The placement over shard nodes behind HTTP. `start` it, and close it at the end."""

    def __init__(self, nodes: Sequence[Sequence[str]], *, api_key: str | None, fallback: Replica | None = None) -> None:
        """Call *nodes*, the URLs of each node's replicas, with *api_key*; *fallback* is not closed by this."""

        def make(name: str, url: str, authority: str | None) -> RemoteHost:
            return RemoteHost(name, url, api_key=api_key, authority=authority)

        self._nodes = [[_Address(url, make) for url in node] for node in nodes]
        self._fallback = fallback
        self._task: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def fallback(self) -> Replica | None:
        """See Placement."""
        return self._fallback

    def replicas(self, shard: int) -> Sequence[Replica]:
        """See Placement."""
        node = self._nodes[shard % len(self._nodes)]
        return node[0].replicas if len(node) == 1 else [replica for address in node for replica in address.replicas]

    def everyone(self) -> Sequence[Replica]:
        """See Placement."""
        found = [replica for node in self._nodes for address in node for replica in address.replicas]
        return found if self._fallback is None else [*found, self._fallback]

    async def start(self) -> None:
        """Resolve all names, and go on doing so in the background."""
        await self._look()
        self._task = asyncio.create_task(self._watch())

    async def aclose(self) -> None:
        """Stop, and close all connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for node in self._nodes:
            for address in node:
                await address.aclose()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        addresses = [address for node in self._nodes for address in node]
        for gone in await asyncio.gather(*(address.look() for address in addresses)):
            for replica in gone:
                task = asyncio.create_task(self._retire(replica))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def _retire(self, replica: Replica) -> None:
        """Close the connections to an address that is gone, once nobody waits for it."""
        for _ in range(100):
            if not replica.in_flight:
                break
            await asyncio.sleep(0.1)
        await replica.host.aclose()
