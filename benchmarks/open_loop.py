"""
The open-loop generator: requests start at times fixed beforehand, whatever became of those before them.

`run(plan)` sends in a process of its own and returns an `OpenResult`; `begin(plan)` lets it send while something else is
done, and its `result()` waits. `python -m benchmarks.open_loop` is that process: a plan as JSON in, what happened out.

A closed loop slows down with the server and so hides overload; this one does not. Latency counts from when a request was
to be sent, so that neither the server's backlog nor the generator's own lateness is left out (the latter is reported).
"""

import asyncio
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, cast

import httptools

from benchmarks.figures import percentile
from benchmarks.machine import ROOT

GRACE_S = 0.25  # Past its deadline a caller waits so much longer, and hangs up.
PATIENCE_S = 60.0
_DEGRADED = re.compile(rb'"degraded":\[([^\]]*)\]')


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """
    What to send where: *bodies_file* holds one JSON body a line, sent in order and again from the first.

    *rate_per_s* requests on average, at equal distances or as a Poisson process of *seed*. An answer counts as good if it
    is a 200 within *deadline_ms*; the generator does not tell the server of it (put `timeout_ms` in the bodies).
    """

    host: str
    port: int
    path: str
    bodies_file: str
    rate_per_s: float
    duration_s: float
    deadline_ms: float
    arrivals: Literal["constant", "poisson"] = "poisson"
    seed: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    max_connections: int = 2000


@dataclass(frozen=True, slots=True)
class OpenResult:
    """
    What became of it, rates per second of the plan's duration.

    *statuses* counts answers by status, `lost` connections and `unanswered` requests; *degraded* the good answers by the
    reasons they name. Percentiles are of the good answers. *late_p99_ms* is how late the generator itself sent, *cpu_s*
    the processor time it took. *good_by_second* holds the good answers of requests due in each second.
    """

    offered_per_s: float
    sent_per_s: float
    answered_per_s: float
    goodput_per_s: float
    statuses: dict[str, int]
    degraded: dict[str, int]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    late_p99_ms: float
    cpu_s: float
    good_by_second: tuple[int, ...]


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, generator: "Generator") -> None:
        self._generator = generator
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._due: float | None = None
        self._give_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, due: float, give_up_s: float) -> None:
        """Send *request*, which was to be sent at *due*, and hang up if it is not answered in *give_up_s*."""
        self._due = due
        if self._transport is None:  # The server closed it before it was used.
            self._report("lost")
            return
        self._body.clear()
        self._give_up = asyncio.get_running_loop().call_later(max(0.0, give_up_s), self._hang_up)
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, which calls `on_body` and `on_message_complete`."""
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """Keep a part of the body."""
        self._body += data

    def on_message_complete(self) -> None:
        """Report the answer and be idle again."""
        status, reusable = self._parser.get_status_code(), self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        self._report(str(status))
        if reusable:
            self._generator.idle.append(self)
        elif self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report a request that will have no answer."""
        self._transport = None
        self._report("lost")
        self._generator.gone(self)

    def _hang_up(self) -> None:
        self._report("unanswered")
        if self._transport is not None:
            self._transport.abort()

    def _report(self, outcome: str) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
        if self._due is not None:
            due, self._due = self._due, None
            self._generator.ended(outcome, due, bytes(self._body))


class Generator:
    """Sends what a plan says and counts what becomes of it."""

    def __init__(self, plan: OpenPlan) -> None:
        self.idle: list[Connection] = []
        self._plan = plan
        self._requests = cycle(_requests(plan))
        self._dues = _arrivals(plan)
        self._openings: set[asyncio.Task[None]] = set()
        self._open = 0
        self._sent = 0
        self._late_s: list[float] = []
        self._outcomes: Counter[str] = Counter()
        self._degraded: Counter[str] = Counter()
        self._good_ms: list[float] = []
        self._seconds = [0] * (int(plan.duration_s) + 1)
        self._left = len(self._dues)
        self._done = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        """Send everything, wait for the last answer, and return what `OpenResult` is made of."""
        loop = asyncio.get_running_loop()
        began = self._began = time.perf_counter()
        for due in self._dues:
            wait_s = began + due - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif self._sent % 16 == 0:
                await asyncio.sleep(0)  # Behind its time it still reads answers.
            self._sent += 1
            if self.idle:
                self._start(self.idle.pop(), due)
            elif self._open < self._plan.max_connections:
                self._open += 1
                opening = loop.create_task(self._connect(due))
                self._openings.add(opening)
                opening.add_done_callback(self._openings.discard)
            else:
                self.ended("lost", due, b"")
        if self._left:
            await self._done.wait()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "offered": len(self._dues),
            "sent": self._sent,
            "statuses": dict(self._outcomes),
            "degraded": dict(self._degraded),
            "good_ms": self._good_ms,
            "late_s": self._late_s,
            "cpu_s": used.ru_utime + used.ru_stime,
            "good_by_second": self._seconds[: max(1, int(self._plan.duration_s))],
        }

    def ended(self, outcome: str, due: float, body: bytes) -> None:
        """Count the *outcome* (a status, `lost`, `unanswered`) of the request that was due then."""
        took_ms = (time.perf_counter() - self._began - due) * 1000
        self._left -= 1
        self._outcomes[outcome] += 1
        if outcome == "200" and took_ms <= self._plan.deadline_ms:
            self._good_ms.append(took_ms)
            self._seconds[int(due)] += 1
            found = _DEGRADED.search(body)
            if found is not None and found[1]:
                self._degraded.update(reason.strip(b'" ').decode() for reason in found[1].split(b","))
        if self._left == 0:
            self._done.set()

    def gone(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self._open -= 1
        if connection in self.idle:
            self.idle.remove(connection)

    async def _connect(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        patience_s = self._plan.deadline_ms / 1000 + GRACE_S - (time.perf_counter() - self._began - due)
        try:
            async with asyncio.timeout(max(0.0, patience_s)):  # A full backlog makes the system try for minutes.
                _, connection = await loop.create_connection(lambda: Connection(self), self._plan.host, self._plan.port)
        except (OSError, TimeoutError) as error:
            self._open -= 1
            self.ended("unanswered" if isinstance(error, TimeoutError) else "lost", due, b"")
        else:
            self._start(connection, due)

    def _start(self, connection: Connection, due: float) -> None:
        late_s = time.perf_counter() - self._began - due
        self._late_s.append(late_s)
        connection.send(next(self._requests), due, self._plan.deadline_ms / 1000 + GRACE_S - late_s)


def _arrivals(plan: OpenPlan) -> list[float]:
    """Return when requests are due, in seconds from the beginning."""
    if plan.arrivals == "constant":
        return [number / plan.rate_per_s for number in range(int(plan.rate_per_s * plan.duration_s))]
    draw, due, dues = random.Random(plan.seed), 0.0, []
    while (due := due + draw.expovariate(plan.rate_per_s)) < plan.duration_s:
        dues.append(due)
    return dues


def _requests(plan: OpenPlan) -> list[bytes]:
    fields = {"Host": plan.host, "Content-Type": "application/json", **plan.headers}
    head = f"POST {plan.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    lines = Path(plan.bodies_file).read_bytes().splitlines()
    return [f"{head}Content-Length: {len(line)}\r\n\r\n".encode() + line for line in lines]


class Sending:
    """A generator at work in its process; `result` waits for its end."""

    def __init__(self, plan: OpenPlan) -> None:
        self._plan = plan
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.open_loop"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(plan)))
        self._process.stdin.close()
        self._process.stdin = None

    def result(self) -> OpenResult:
        """Return what became of it. Raises RuntimeError when the generator itself failed."""
        try:
            limit_s = self._plan.duration_s + self._plan.deadline_ms / 1000 + PATIENCE_S
            output, errors = self._process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise RuntimeError("the open-loop generator did not end") from None
        if self._process.returncode:
            raise RuntimeError(f"the open-loop generator died: {errors.strip()[-500:]}")
        return _result(self._plan, json.loads(output))

    def stop(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.communicate()


def _result(plan: OpenPlan, happened: Mapping[str, Any]) -> OpenResult:
    good_ms = happened["good_ms"]
    statuses = happened["statuses"]
    answered = sum(count for outcome, count in statuses.items() if outcome.isdigit())
    p50_ms, p90_ms, p99_ms = (percentile(good_ms, at) if good_ms else 0.0 for at in (50, 90, 99))
    return OpenResult(
        offered_per_s=happened["offered"] / plan.duration_s,
        sent_per_s=happened["sent"] / plan.duration_s,
        answered_per_s=answered / plan.duration_s,
        goodput_per_s=len(good_ms) / plan.duration_s,
        statuses=statuses,
        degraded=happened["degraded"],
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        max_ms=max(good_ms, default=0.0),
        late_p99_ms=percentile(happened["late_s"], 99) * 1000 if happened["late_s"] else 0.0,
        cpu_s=happened["cpu_s"],
        good_by_second=tuple(happened["good_by_second"]),
    )


def begin(plan: OpenPlan) -> Sending:
    """Start sending in another process."""
    return Sending(plan)


def run(plan: OpenPlan) -> OpenResult:
    """Send all of *plan* from another process and return what became of it. Raises RuntimeError when it failed."""
    return begin(plan).result()


def main() -> None:
    """Run the plan on standard input."""
    import uvloop

    plan = OpenPlan(**json.load(sys.stdin))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))

    async def generate() -> dict[str, Any]:
        return await Generator(plan).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(runner.run(generate()), sys.stdout)


if __name__ == "__main__":
    main()
