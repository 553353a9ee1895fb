"""Answers leave in one write, over a real socket, whatever they are made of."""

import asyncio

import uvicorn
from starlette.types import Receive, Scope, Send

from services.common.http_protocol import HoldingTransport, OneWriteProtocol

PATIENCE_S = 10.0


class Transport:
    """Remembers what reached the socket."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


async def test_two_writes_are_one():
    """The head waits for the body, and no longer than that."""
    inner = Transport()
    held = HoldingTransport(inner)
    held.write(b"head")
    assert inner.writes == []
    held.write(b"body")
    assert inner.writes == [b"headbody"]
    held.write(b"next")
    held.write(b"")
    assert inner.writes == [b"headbody", b"next"]


async def test_one_write_waits_no_longer_than_a_turn():
    """The head of a stream is sent although its first piece is not made yet."""
    inner = Transport()
    held = HoldingTransport(inner)
    held.write(b"head")
    await asyncio.sleep(0)
    assert inner.writes == [b"head"]
    await asyncio.sleep(0)
    assert inner.writes == [b"head"]


async def test_closing_loses_nothing():
    """What is held is sent first; the rest of a transport is as it was."""
    inner = Transport()
    held = HoldingTransport(inner)
    held.write(b"last words")
    held.close()
    assert (inner.writes, inner.closed, held.is_closing()) == ([b"last words"], True, True)
    await asyncio.sleep(0)
    assert inner.writes == [b"last words"]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path, in pieces if the path says so."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/pieces":
        for piece in (b"one ", b"two "):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def test_answers_over_a_socket_are_whole():
    """Keep-alive, pipelined requests, HEAD, streams and a last answer before the connection closes."""
    config = uvicorn.Config(app, port=0, http=OneWriteProtocol, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(PATIENCE_S):
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for line in ("GET /a", "GET /b", "HEAD /c", "GET /pieces"):
            writer.write(f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        writer.write(b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = await reader.read()
        writer.close()
        server.should_exit = True
        await serving
    assert received.count(b"HTTP/1.1 200 OK") == 5
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in received.split(b"HTTP/1.1 200 OK")[1:]]
    assert bodies[0] == b"2\r\n/a\r\n0\r\n\r\n"
    assert bodies[2] == b""
    assert bodies[3].replace(b"\r\n", b"") == b"4one 4two 7/pieces0"
    assert bodies[4] == b"5\r\n/last\r\n0\r\n\r\n"


async def test_a_server_that_stops_answers_one_more_request_on_each_connection():
    """Who sends while the server is told to stop is answered, and told to go elsewhere; idle connections are closed."""
    config = uvicorn.Config(
        app, port=0, http=OneWriteProtocol, log_config=None, lifespan="off", timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(PATIENCE_S):
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        used, unused = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        used[1].write(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n")
        first = await used[0].readuntil(b"0\r\n\r\n")
        server.should_exit = True
        while server.servers[0].is_serving():
            await asyncio.sleep(0.01)
        used[1].write(b"GET /second HTTP/1.1\r\nHost: x\r\n\r\n")
        second, nothing = await used[0].read(), await unused[0].read()
        await serving
        for _, writer in (used, unused):
            writer.close()
    assert b"connection: close" not in first
    assert second.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in second
    assert b"/second" in second
    assert nothing == b""
