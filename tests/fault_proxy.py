"""A TCP proxy before a real process that can refuse, freeze, slow, garble, reset, flood or drip what passes through it."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, Self

Mode = Literal["pass", "refuse", "freeze", "slow", "garbage", "raw", "reset", "huge", "drip"]

SLOW_S: Final = 2.0
HUGE_BYTES: Final = 100_000_000
_ROGUE: Final = frozenset({"garbage", "raw", "huge", "drip"})
_CHUNK_BYTES: Final = 65_536
_DRIP_S: Final = 0.05
_RUBBISH: Final = b'{"data": [{"ind\x00\xff\xfe], "hits": "what?", 12'
_NOISE: Final = bytes((7 * n * n + 131) % 256 for n in range(512))
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class FaultProxy:
    """
    Listens on a port of its own, in a thread of its own, and passes everything to *port* of this machine.

    `behave` changes what becomes of all connections, those that are open too, from the moment it returns: `refuse` (nobody
    listens, what was open is closed), `freeze` (connections are taken, nothing comes, what was held goes on afterwards),
    `slow` (each turn of the caller's is passed on *slow_s* later), `garbage` (HTTP 200 with rubbish in place of JSON), `raw`
    (rubbish), `reset` (RST), `huge` (HTTP 200 with a body of 100 MB), `drip` (HTTP 200, a byte now and then, for ever).
    """

    def __init__(self, port: int, *, slow_s: float = SLOW_S) -> None:
        self._upstream_port = port
        self._slow_s = slow_s
        self._mode: Mode = "pass"
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.sent_bytes = 0
        self._run(self._listen())

    @property
    def url(self) -> str:
        """Its address, for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def mode(self) -> Mode:
        """What it does now."""
        return self._mode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def behave(self, mode: Mode) -> None:
        """Do *mode* from now on."""
        self._run(self._behave(mode))

    def close(self) -> None:
        """Close all connections and end the thread."""
        self._run(self._behave("refuse"))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    async def _behave(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        self._changed = asyncio.Event()
        if mode == "refuse" and self._server is not None:
            self._server.close()
            self._server = None
        elif mode != "refuse" and self._server is None:
            await self._listen()
        if mode in ("refuse", "reset"):
            tasks = [connection.task for connection in self._connections]
            for connection in list(self._connections):
                connection.abort(reset=mode == "reset")
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until_changed(self) -> None:
        """Wait until `behave` is called."""
        await self._changed.wait()

    async def open_upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the real process. Raises OSError."""
        return await asyncio.open_connection("127.0.0.1", self._upstream_port)

    async def pause(self) -> None:
        """Wait as long as a slow turn takes."""
        await asyncio.sleep(self._slow_s)


class _Connection:
    """One caller's connection and, once there is something to pass on, the one behind it."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[None] = task
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._upstream: asyncio.StreamWriter | None = None
        self._back: asyncio.Task[None] | None = None
        self._callers_turn = True

    async def serve(self) -> None:
        """Pass bytes both ways, as the proxy's mode wants it, until one side ends."""
        try:
            await self._forth()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self.abort(reset=False)

    def abort(self, *, reset: bool) -> None:
        """Close both sides at once; the caller sees an RST if *reset*, and may see one otherwise."""
        if reset:
            sock = self._writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        for writer in (self._writer, self._upstream):
            if writer is not None:
                writer.transport.abort()
        if self._back is not None:
            self._back.cancel()
        if self.task is not asyncio.current_task():
            self.task.cancel()

    async def _forth(self) -> None:
        while data := await self._reader.read(_CHUNK_BYTES):
            if self._proxy.mode == "slow" and self._callers_turn:
                await self._proxy.pause()
            self._callers_turn = False
            if await self._held_or_rogue():
                return
            if self._upstream is None:
                upstream_reader, self._upstream = await self._proxy.open_upstream()
                self._back = asyncio.create_task(self._return(upstream_reader))
            self._upstream.write(data)
            await self._upstream.drain()

    async def _return(self, upstream: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await upstream.read(_CHUNK_BYTES):
                if await self._held_or_rogue():
                    break
                self._callers_turn = True
                self._writer.write(data)
                await self._writer.drain()
        # What was written is still sent; then the caller's side ends, and with it the other task.
        self._writer.close()

    async def _held_or_rogue(self) -> bool:
        """Wait while all is frozen; say rubbish where the mode is a rogue's and return True: the connection is over."""
        while self._proxy.mode == "freeze":
            await self._proxy.until_changed()
        mode = self._proxy.mode
        if mode == "reset":
            self.abort(reset=True)
            return True
        if mode not in _ROGUE:
            return False
        await self._say_rubbish(mode)
        with suppress(OSError):
            self._writer.close()
            await self._writer.wait_closed()
        return True

    async def _say_rubbish(self, mode: Mode) -> None:
        if mode == "raw":
            self._send(_NOISE)
            return
        length = {"garbage": len(_RUBBISH), "huge": HUGE_BYTES}.get(mode, 1_000_000)
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        self._send(head.encode())
        if mode == "garbage":
            self._send(_RUBBISH)
            return
        block = b'"' if mode == "drip" else b"x" * _CHUNK_BYTES
        for _ in range(-(-length // len(block))):
            if self._proxy.mode != mode:
                return
            self._send(block)
            await self._writer.drain()
            if mode == "drip":
                await asyncio.sleep(_DRIP_S)

    def _send(self, data: bytes) -> None:
        self._writer.write(data)
        self._proxy.sent_bytes += len(data)
