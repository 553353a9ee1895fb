"""A peer service for the tests: a real HTTP server on a real socket, which answers as it is told and misbehaves on demand."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import orjson


@dataclass
class Request:
    """What arrived: header names in lower case, and the number of the connection that it came by."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    connection: int


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


def says(status: int = 200, content: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    """Answer in order."""

    async def answer(_request: Request, writer: asyncio.StreamWriter) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n{lines}\r\n".encode() + content)

    return answer


def json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """Answer with JSON."""
    return says(status, orjson.dumps(value), headers)


def raw(content: bytes) -> Answer:
    """Send bytes that are no HTTP reply, or only the start of one, and close."""

    async def answer(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        writer.close()

    return answer


async def closes(_request: Request, writer: asyncio.StreamWriter) -> None:
    """Close the connection in place of an answer."""
    writer.close()


async def resets(_request: Request, writer: asyncio.StreamWriter) -> None:
    """Cut the connection off with a RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def hangs(_request: Request, _writer: asyncio.StreamWriter) -> None:
    """Take the request, and never answer it."""
    await asyncio.sleep(3600)


async def drips(_request: Request, writer: asyncio.StreamWriter) -> None:
    """Send an answer without end, a byte every millisecond."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.001)


async def floods(request: Request, writer: asyncio.StreamWriter) -> None:
    """Send an answer without end as fast as it is taken; the peer's *sent* counts the bytes."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        await writer.drain()


def after(seconds: float, answer: Answer) -> Answer:
    """Answer later."""

    async def late(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await answer(request, writer)

    return late


@dataclass
class Peer:
    """
    Gives the next of *answers* to each request, the last one for ever; an async context manager.

    *requests* are those that came; *gone* counts the answers whose caller had left before they were done.
    """

    answers: list[Answer]
    host: str = "127.0.0.1"
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    gone: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port as before if it was stopped."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut all connections."""
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Close all connections that are open, as a server does with idle ones."""
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.add(writer)
        task = asyncio.create_task(self._speak(reader, writer, number))
        self._tasks.add(task)
        await asyncio.wait({task})
        self._tasks.discard(task)
        self._writers.discard(writer)
        writer.close()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        try:
            while not writer.is_closing():
                request = await self._read(reader, number)
                self.requests.append(request)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                answering = asyncio.create_task(answer(request, writer))
                leaving = asyncio.create_task(reader.read(1))
                try:
                    await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                    if not answering.done():
                        self.gone += 1
                        return
                finally:
                    answering.cancel()
                    leaving.cancel()
                    await asyncio.wait({answering, leaving})
                if not answering.cancelled():
                    answering.result()
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async def _read(self, reader: asyncio.StreamReader, number: int) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        return Request(method, path, headers, content, number)
