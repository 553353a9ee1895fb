"""uvicorn's HTTP protocol, with the head and the body of an answer in one write: a system call and a packet less each."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class OneWriteProtocol(HttpToolsProtocol):
    """Give it to uvicorn as `http`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection."""
        super().connection_made(HoldingTransport(transport))  # type: ignore[arg-type]


class HoldingTransport:
    """
    Holds what is written until more is, or the event loop has its next turn, and then passes it on as one.

    Everything else goes straight to *transport*; nothing that was held is lost by closing.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        self._flush_soon: asyncio.Handle | None = None

    def write(self, data: bytes) -> None:
        """Hold *data*, or pass it on with what is held."""
        if self._flush_soon is None:
            self._held = data
            self._flush_soon = asyncio.get_running_loop().call_soon(self._flush)
        else:
            self._held += data
            self._flush()

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._flush_soon is not None:
            self._flush_soon.cancel()
            self._flush_soon = None
            held, self._held = self._held, b""
            self._transport.write(held)
