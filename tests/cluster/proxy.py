"""What kube-proxy does for a Service with an address of its own: each connection goes to one of the ready pods."""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress

_CHUNK = 65536


class Proxy:
    """
    Listens at *address* and *port*; each new connection gets one of *ready*'s addresses for as long as it lasts.

    Without any it is reset, where kube-proxy would refuse it: the caller has no answer either way.
    """

    def __init__(self, address: str, port: int, target_port: int, ready: Callable[[], Sequence[str]]) -> None:
        self._address, self._port, self._target_port = address, port, target_port
        self._ready = ready
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, self._address, self._port, backlog=512)

    async def aclose(self) -> None:
        """Break all connections."""
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            pod = random.choice(list(self._ready()))
            back_reader, back_writer = await asyncio.open_connection(pod, self._target_port)
        except (OSError, IndexError):
            writer.transport.abort()
            return
        with suppress(OSError):
            await asyncio.gather(_pass_on(reader, back_writer), _pass_on(back_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all that comes, then the end; a connection that broke breaks the other one."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.transport.abort()
        raise
