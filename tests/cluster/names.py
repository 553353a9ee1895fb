"""The cluster's DNS: A records of Services and of StatefulSets' pods, over UDP."""

import asyncio
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.cluster.isolation import NAMESERVER

DOMAIN = "tercet.svc.cluster.local"
_TTL_S = 5
_A, _IN = 1, 1
_NO_SUCH_NAME = 3


class Names(asyncio.DatagramProtocol):
    """
    Answers with what *lookup* returns for a name of the namespace: addresses, none, or None where there is no such name.

    Answers are kept for *kept_s* seconds, as CoreDNS keeps them: those who ask learn of a change only then.
    """

    def __init__(self, lookup: Callable[[str], Sequence[str] | None], kept_s: float) -> None:
        self._lookup = lookup
        self._kept_s = kept_s
        self._kept: dict[str, tuple[float, Sequence[str] | None]] = {}
        self._transport: Any = None

    async def open(self) -> None:
        """Listen on port 53 of the nameserver's address."""
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, (NAMESERVER, 53))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what answers are sent by."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one query."""
        self._transport.sendto(self._answer(data), addr)

    def _answer(self, query: bytes) -> bytes:
        name, end = _name_at(query, 12)
        kind, _ = struct.unpack_from("!HH", query, end)
        found = self._addresses(name)
        records = [] if found is None or kind != _A else found
        flags = 0x8580 | (_NO_SUCH_NAME if found is None else 0)
        head = query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0)
        body = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", _A, _IN, _TTL_S, 4) + bytes(int(part) for part in address.split("."))
            for address in records
        )
        return head + query[12 : end + 4] + body

    def _addresses(self, name: str) -> Sequence[str] | None:
        now = time.monotonic()
        until, found = self._kept.get(name, (0.0, None))
        if now >= until:
            short = name.removesuffix(f".{DOMAIN}")
            found = self._lookup(short) if short != name else None
            self._kept[name] = now + self._kept_s, found
        return found


def _name_at(message: bytes, at: int) -> tuple[str, int]:
    """Return the name that begins at *at*, in small letters, and where it ends."""
    labels = []
    while length := message[at]:
        labels.append(message[at + 1 : at + 1 + length].decode("ascii", "replace").lower())
        at += 1 + length
    return ".".join(labels), at + 1
