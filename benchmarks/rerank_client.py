"""
A crowd of rerank clients in a process of its own: `python -m benchmarks.rerank_client` reads a plan as JSON.

Every connection sends its next request when the last was answered; they begin at moments spread over the first deadline,
as callers do who know nothing of each other. Printed is what became of each request: when it ended, how long it took, its
status, and how many documents were scored.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass

import orjson
import uvloop

from benchmarks.client import Connection, Plan, requests_of


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: its end in seconds after the start, its latency, its status, how many of its documents were scored."""

    ended_s: float
    latency_ms: float
    status: int
    scored: int


class Replies(Connection):
    """A connection that keeps the body of the reply."""

    def __init__(self) -> None:
        super().__init__()
        self._body = b""

    def on_body(self, body: bytes) -> None:
        """Keep a part of the reply's body."""
        self._body += body

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send *request* and return the reply's status and body. Raises ConnectionResetError."""
        self._body = b""
        status = await self.send(request)
        return status, self._body


async def crowd(plan: Plan, spread_s: float) -> list[Outcome]:
    """Send what *plan* says, the connections beginning within *spread_s*; requests under way at the end are waited for."""
    outcomes: list[Outcome] = []
    bodies = requests_of(plan)
    loop = asyncio.get_running_loop()
    draw = random.Random(plan.seed)
    connections = [(await loop.create_connection(Replies, plan.host, plan.port))[1] for _ in range(plan.connections)]
    started = time.perf_counter()

    async def one(connection: Replies, begin_s: float) -> None:
        await asyncio.sleep(begin_s)
        while (began := time.perf_counter()) < started + plan.duration_s:
            status, body = await connection.exchange(next(bodies))
            ended = time.perf_counter()
            scored = sum(result["scored"] for result in orjson.loads(body)["results"]) if status == 200 else 0
            outcomes.append(Outcome(ended - started, (ended - began) * 1000, status, scored))
            if status != 200:
                await asyncio.sleep(0.01)  # Who is turned away and asks again at once is no caller but an attack.

    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(one(connection, draw.uniform(0, spread_s)))
    for connection in connections:
        connection.close()
    return outcomes


def main() -> None:
    """Send the plan on standard input and print the outcomes."""
    given = json.load(sys.stdin)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes = runner.run(crowd(Plan(**given["plan"]), given["spread_s"]))
    json.dump([asdict(outcome) for outcome in outcomes], sys.stdout)


if __name__ == "__main__":
    main()
