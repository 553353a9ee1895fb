"""How late answers come that were asked for within a time: whole searches with a `timeout_ms` of all kinds."""

import http.client
import random
import time
from collections import Counter, defaultdict

import orjson

from benchmarks.corpus import Questions
from benchmarks.effort import QUICK, Effort
from benchmarks.figures import number, percentile
from benchmarks.load import LoadFailed
from benchmarks.report import Row
from benchmarks.servers import Running

REQUESTS, QUICK_REQUESTS = 10_000, 300
TIMEOUTS_MS = (10, 20, 40, 60, 90, 130, 200)

_PATIENCE_S = 60.0
_ANSWERED_IN_TIME = (200, 504)


def overshoot(effort: Effort, front: Running, questions: Questions) -> Row:
    """Ask for hybrid search with rerank of 30 within times that suffice, and that do not."""
    count = QUICK_REQUESTS if effort == QUICK else REQUESTS
    draw = random.Random(5)
    over_ms: dict[int, list[float]] = defaultdict(list)
    said: dict[int, Counter[str]] = defaultdict(Counter)
    connection = http.client.HTTPConnection(front.host, front.port, timeout=_PATIENCE_S)
    for question in questions.take(count):
        timeout_ms = draw.choice(TIMEOUTS_MS)
        body = orjson.dumps(
            {"query": question, "rerank": True, "timeout_ms": timeout_ms, "cache": False, "include": []}
        )
        began = time.perf_counter()
        connection.request("POST", "/search", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        over_ms[timeout_ms].append((time.perf_counter() - began) * 1000 - timeout_ms)
        if reply.status not in _ANSWERED_IN_TIME:
            raise LoadFailed(f"a search with timeout_ms {timeout_ms} was answered {reply.status}: {content[:300]!r}")
        said[timeout_ms][_outcome(reply.status, content)] += 1
    connection.close()
    row = Row(
        "overshoot",
        f"overshoot of `timeout_ms` in {count:,} requests",
        "One client, hybrid + rerank of 30, distinct questions, cache bypassed, `timeout_ms` drawn from "
        f"{', '.join(map(str, TIMEOUTS_MS))}; the caller's own clock, on the machine that works. To reach: p99.9 ≤ 20 ms, "
        "worst ≤ 150 ms.",
        ("timeout_ms", "requests", "late by p99, ms", "late by p99.9, ms", "late by worst, ms", "answers"),
    )
    for timeout_ms in TIMEOUTS_MS:
        outcomes = ", ".join(f"{name} {times}" for name, times in said[timeout_ms].most_common())
        row.lines.append((str(timeout_ms), *_late(over_ms[timeout_ms]), outcomes))
    row.lines.append(("all", *_late([each for values in over_ms.values() for each in values]), ""))
    return row


def _outcome(status: int, content: bytes) -> str:
    if status != 200:
        return str(status)
    return " + ".join(sorted(orjson.loads(content)["degraded"])) or "whole"


def _late(over_ms: list[float]) -> tuple[str, ...]:
    late = [max(0.0, each) for each in over_ms]
    return (f"{len(late):,}", *(number(percentile(late, at)) for at in (99, 99.9)), number(max(late)))
