"""
Sends load to a server from another process and says what came of it.

`wrk` sends the short requests, many per second, that a Python client could not send without taking a core; where it is
missing the asyncio client does. That client (benchmarks/client.py) also sends whatever wrk cannot count rightly: open
loops, pauses, and requests so long that those under way at the end are a share of the whole (`steady_rate` leaves out the
first and unfinished ones). Every server gets the same client.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

from benchmarks.client import Plan
from benchmarks.figures import percentile
from benchmarks.machine import ROOT
from benchmarks.servers import Running

PATIENCE_S = 120.0
WAVES = 4  # The first is not counted.
LONGEST_S = 40.0
INSTALL_WRK = "wrk is not installed (Debian: apt-get install wrk): the Python client sends the load, and takes a core"


class LoadFailed(Exception):
    """Requests failed, so the figure would mean nothing; the message says how."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A measured stretch of a closed loop."""

    connections: int
    duration_s: float

    def long_enough_for(self, alone_s: float) -> "Stretch":
        """Return this stretch, or a longer one (to a limit) in which four waves of requests end that take *alone_s* alone."""
        needed_s = min(LONGEST_S, WAVES * self.connections * alone_s)
        return replace(self, duration_s=max(self.duration_s, needed_s))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one measured stretch gave."""

    client: str
    requests: int
    per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    latencies_ms: tuple[float, ...] = ()


def steady_rate(ends_s: Sequence[float], connections: int) -> float:
    """
    Return requests per second of a closed loop from when each of its requests ended.

    Counts from the end of the first wave (one request per connection) to the last end: neither the ramp at the start nor
    the requests under way at the end, which would count against the slower server, are in it.
    """
    ordered = sorted(ends_s)
    if len(ordered) <= connections or ordered[-1] == ordered[connections - 1]:
        raise LoadFailed(f"{len(ordered)} requests ended on {connections} connections: measure longer")
    return (len(ordered) - connections) / (ordered[-1] - ordered[connections - 1])


class Sending:
    """The asyncio client at work; `result` waits for its end."""

    def __init__(
        self,
        plan: Plan,
        process: "subprocess.Popen[str]",
        directory: "tempfile.TemporaryDirectory[str]",
        distinct: int | None,
    ) -> None:
        self._plan = plan
        self._distinct = distinct
        self._process = process
        self._directory = directory

    def result(self) -> LoadResult:
        """Return what came of it. Raises LoadFailed when a request failed or none ended."""
        try:
            output, errors = self._process.communicate(timeout=self._plan.duration_s + PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise LoadFailed(f"no answer within {PATIENCE_S:.0f} s after the end") from None
        finally:
            self._directory.cleanup()
        if self._process.returncode:
            raise LoadFailed(errors.strip().splitlines()[-1] if errors.strip() else "the load client died")
        happened = json.loads(output)
        if happened["failures"]:
            raise LoadFailed(f"{len(happened['failures'])} requests failed, the first: {happened['failures'][0]}")
        if self._distinct is not None and happened["sent"] > self._distinct:
            raise LoadFailed(f"{self._distinct} distinct requests were too few for {happened['sent']}")
        latencies = happened["latencies_ms"]
        if not latencies:
            raise LoadFailed("no request ended in time")
        if self._plan.rate_per_s is None and not self._plan.pause_s:
            per_s = steady_rate(happened["ends_s"], self._plan.connections)
        else:
            per_s = len(latencies) / max(happened["ends_s"])
        p50_ms, p90_ms, p99_ms = (percentile(latencies, percent) for percent in (50, 90, 99))
        return LoadResult("asyncio", len(latencies), per_s, p50_ms, p90_ms, p99_ms, max(latencies), tuple(latencies))


def send(
    server: Running,
    requests: Sequence[Sequence[str]],
    stretch: Stretch,
    *,
    pause_s: float = 0.0,
    rate_per_s: float | None = None,
    seed: int = 0,
    repeat: bool = False,
    fields: Mapping[str, str] = MappingProxyType({}),
) -> Sending:
    """
    Start sending *requests* (the texts of each) with the asyncio client.

    When they run out it begins again at the first; unless *repeat* says that this is meant, the result is a LoadFailed.
    *fields* (`lane`, `encoding`) go into our own service's bodies; peers have no such thing.
    """
    directory = tempfile.TemporaryDirectory(prefix="tercet-bench-")
    bodies = _write_bodies(server, requests, Path(directory.name), fields)
    plan = Plan(
        host=server.host,
        port=server.port,
        path=server.spec.path,
        bodies_file=str(bodies),
        connections=stretch.connections,
        duration_s=stretch.duration_s,
        pause_s=pause_s,
        rate_per_s=rate_per_s,
        seed=seed,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.client"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(plan)))
    process.stdin.close()
    process.stdin = None
    return Sending(plan, process, directory, None if repeat else len(requests))


def hammer(
    server: Running, requests: Sequence[Sequence[str]], stretch: Stretch, wrk: str | None, *, repeat: bool = False
) -> LoadResult:
    """
    Send *requests* in a closed loop with wrk (a path), or with the asyncio client where it is None; each once, or, with
    *repeat*, again and again.

    Raises:
        LoadFailed: A request failed, or there were too few requests for none to be sent twice.
    """
    if wrk is None:
        return send(server, requests, stretch, repeat=repeat).result()
    script = Path(__file__).with_name("wrk.lua")
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as directory:
        bodies = _write_bodies(server, requests, Path(directory), {})
        options = f"-t1 -c{stretch.connections} -d{max(1, round(stretch.duration_s))}s --timeout 60s".split()
        url = f"http://{server.host}:{server.port}{server.spec.path}"
        command = [wrk, *options, "--script", str(script), url, "--", str(bodies)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=stretch.duration_s + PATIENCE_S, check=False
        )
    try:
        happened = json.loads(ended.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise LoadFailed(f"wrk: {(ended.stderr or ended.stdout).strip()}") from None
    if happened["failed"]:
        raise LoadFailed(f"{happened['failed']} of {happened['requests']} requests failed")
    if happened["again"] and not repeat:
        raise LoadFailed(f"{len(requests)} distinct requests were too few for {happened['requests']}")
    per_s = happened["requests"] / happened["duration_us"] * 1e6
    p50_ms, p90_ms, p99_ms, max_ms = (happened[f"{name}_us"] / 1000 for name in ("p50", "p90", "p99", "max"))
    return LoadResult("wrk", happened["requests"], per_s, p50_ms, p90_ms, p99_ms, max_ms)


def find_wrk() -> str | None:
    """Return the path of wrk; where it is missing, say how to get it and return None."""
    found = shutil.which("wrk")
    if found is None:
        print(INSTALL_WRK)
    return found


def _write_bodies(
    server: Running, requests: Sequence[Sequence[str]], directory: Path, fields: Mapping[str, str]
) -> Path:
    path = directory / "bodies"
    path.write_bytes(b"\n".join(server.spec.body(texts, fields) for texts in requests))
    return path
