"""
uvicorn's HTTP protocol, with the head and the body of an answer in one write: a system call and a packet less each.

And with an end that costs no caller a request: a connection that is idle when the server is told to stop may have one on
its way already, so it is not closed at once.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LAST_CHANCE_S = 1.0


class OneWriteProtocol(HttpToolsProtocol):
    """Give it to uvicorn as `http`."""

    _last = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection."""
        super().connection_made(HoldingTransport(transport))  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """
        Stop after the request that is under way, which says so in its answer if that has not begun.

        Without one, or after it, one more is answered, with `connection: close`, if it comes within LAST_CHANCE_S.
        """
        self._last = True
        grace_s = self.config.timeout_graceful_shutdown
        last_chance_s = LAST_CHANCE_S if grace_s is None else min(LAST_CHANCE_S, grace_s / 2)
        self.timeout_keep_alive = last_chance_s  # type: ignore[assignment]  # Seconds for call_later, which takes a float.
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(last_chance_s, self.timeout_keep_alive_handler)
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        """Begin to serve a request; the last one if the server is to stop."""
        super().on_headers_complete()
        if self._last and self.cycle is not None:
            self.cycle.keep_alive = False


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
