"""
Which addresses the shard nodes have.

Node *i* of *n* has the shards s with s mod n = i. A name that resolves to several addresses (a headless service) is as
many replicas; names are resolved again all the time, since connections that stay open would never find a new one.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import structlog

from services.search.shards.remote import RemoteHost
from services.search.shards.replicas import Replica

RESOLVE_EVERY_S = 5.0
RESOLVE_PATIENCE_S = 3.0

_log = structlog.get_logger(__name__)


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, in a fixed order. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(info[4][0]) for info in found})


class _Address:
    """One URL of the settings, and a replica for every address that it now has."""

    def __init__(self, url: str, make: Callable[[str, str, str | None], RemoteHost]) -> None:
        self.url = url
        self._make = make
        self._parts = urlsplit(url)
        self._by_address: dict[str, Replica] = {}
        self._unresolved = Replica(make(url, url, None))
        self.replicas: tuple[Replica, ...] = (self._unresolved,)

    async def look(self) -> list[Replica]:
        """Resolve the name again, and return the replicas whose addresses are no longer its."""
        host = self._parts.hostname or ""
        port = self._parts.port or (443 if self._parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(RESOLVE_PATIENCE_S):
                addresses = await resolve(host, port)
        except (OSError, TimeoutError) as error:
            _log.warning("name_not_resolved", url=self.url, error=repr(error))
            return []
        for address in addresses:
            if address not in self._by_address:
                literal = f"[{address}]" if ":" in address else address
                named = self.url if len(addresses) == 1 else f"{self.url} ({address})"
                self._by_address[address] = Replica(
                    self._make(named, f"{self._parts.scheme}://{literal}:{port}", f"{host}:{port}")
                )
        gone = [self._by_address.pop(address) for address in set(self._by_address) - set(addresses)]
        if self._by_address:
            self.replicas = tuple(self._by_address[address] for address in addresses)
        return gone

    def everyone(self) -> list[Replica]:
        """Return all replicas that may have connections."""
        return [*self._by_address.values(), self._unresolved]


class Nodes:
    """The placement over shard nodes behind HTTP. `start` it, and close it at the end."""

    def __init__(self, nodes: Sequence[Sequence[str]], *, api_key: str | None, fallback: Replica | None = None) -> None:
        """Call *nodes*, the URLs of each node's replicas, with *api_key*; *fallback* is not closed by this."""

        def make(name: str, url: str, host_header: str | None) -> RemoteHost:
            return RemoteHost(name, url, api_key=api_key, host_header=host_header)

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
                for replica in address.everyone():
                    await replica.host.aclose()
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
