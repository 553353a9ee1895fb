"""
The load client, in a process of its own: `python -m benchmarks.client` reads a plan as JSON, prints what happened.

Raw keep-alive HTTP/1.1 connections; bodies are prepared before the clock starts and replies are read, not parsed. Closed
loop: each connection sends its next request when the last was answered (and a pause is over). Open loop: requests start
at Poisson times whatever became of earlier ones, and latency counts from the intended start.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import cast

import httptools


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send where: *bodies_file* holds one JSON body a line, sent in order and again from the first."""

    host: str
    port: int
    path: str
    bodies_file: str
    connections: int
    duration_s: float
    pause_s: float = 0.0
    rate_per_s: float | None = None
    seed: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


class Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[int] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes.

    def data_received(self, data: bytes) -> None:
        """Feed the parser, which calls `on_message_complete`."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Give the waiting request its status."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(self._parser.get_status_code())
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the waiting request."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionResetError("The server closed the connection"))

    async def send(self, request: bytes) -> int:
        """Send *request* and return the status once the reply is complete. Raises ConnectionResetError."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


class Client:
    """Sends what a plan says and keeps, for each answered request, when it ended and how long it took."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._requests = requests_of(plan)
        self.sent = 0
        self.ends_s: list[float] = []
        self.latencies_ms: list[float] = []
        self.failures: list[str] = []

    async def run(self) -> None:
        """Send for the plan's duration; requests under way at the end are abandoned in a closed loop only."""
        connections = [await self._connect() for _ in range(self._plan.connections)]
        self._started = time.perf_counter()
        try:
            if self._plan.rate_per_s is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._plan.duration_s):
                        await asyncio.gather(*(self._closed(connection) for connection in connections))
            else:
                await self._open(connections, self._plan.rate_per_s)
        finally:
            for connection in connections:
                connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._plan.host, self._plan.port)
        return connection

    async def _exchange(self, connection: Connection, intended: float) -> None:
        self.sent += 1
        try:
            status = await connection.send(next(self._requests))
        except ConnectionResetError as error:
            self.failures.append(str(error))
            raise
        ended = time.perf_counter()
        if status != 200:
            self.failures.append(f"status {status}")
            return
        self.ends_s.append(ended - self._started)
        self.latencies_ms.append((ended - intended) * 1000)

    async def _closed(self, connection: Connection) -> None:
        while True:
            await self._exchange(connection, time.perf_counter())
            if self._plan.pause_s:
                await asyncio.sleep(self._plan.pause_s)

    async def _open(self, connections: list[Connection], rate_per_s: float) -> None:
        idle = list(connections)
        draw = random.Random(self._plan.seed)

        async def one(intended: float) -> None:
            if idle:
                connection = idle.pop()
            else:
                connection = await self._connect()
                connections.append(connection)
            await self._exchange(connection, intended)
            idle.append(connection)

        async with asyncio.TaskGroup() as group:
            intended = self._started
            while (intended := intended + draw.expovariate(rate_per_s)) < self._started + self._plan.duration_s:
                await asyncio.sleep(max(0.0, intended - time.perf_counter()))
                group.create_task(one(intended))


def requests_of(plan: Plan) -> Iterator[bytes]:
    """Return the plan's requests as bytes on the wire, endlessly."""
    headers = {"Host": plan.host, "Content-Type": "application/json", **plan.headers}
    head = "\r\n".join([f"POST {plan.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), ""])
    return cycle(
        [
            f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            for body in Path(plan.bodies_file).read_bytes().splitlines()
        ]
    )


def main() -> None:
    """Run the plan on standard input."""
    client = Client(Plan(**json.load(sys.stdin)))
    try:
        import uvloop
    except ImportError:
        loop_factory = None
    else:
        loop_factory = uvloop.new_event_loop
    with contextlib.suppress(ConnectionResetError, ExceptionGroup), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(client.run())
    happened = {"sent": client.sent, "failures": client.failures, "ends_s": client.ends_s}
    json.dump({**happened, "latencies_ms": client.latencies_ms}, sys.stdout)


if __name__ == "__main__":
    main()
