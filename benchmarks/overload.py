"""Three times as many searches as there is capacity for, from an open loop, and what is left of the goodput."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import number
from benchmarks.load import Stretch
from benchmarks.open_loop import OpenPlan, OpenResult, run
from benchmarks.report import Row
from benchmarks.searching import Bench
from benchmarks.servers import OURS, Running
from benchmarks.stack import Stack, asking, only

TIMES = 3.0
DEADLINE_MS = 1000
CLIENTS, RERANK_CLIENTS = 16, 4  # As many as keep both cores busy, and no more: none of them is refused.

_AFTER_S, _AFTER_SHARE = 3.0, 0.2
_PATIENT_MS = 60_000
_HEADER = (
    "stack",
    "capacity/s",
    "peak goodput/s",
    "offered/s",
    "goodput/s",
    "of the peak",
    "p50 / p99 ms of the good",
    "answers",
    "resident MB before → after",
    "at a fifth of capacity after: good, p50 / p99 ms",
    "generator's CPU s/s",
)


@dataclass(frozen=True, slots=True)
class _Flood:
    """What one stack did with more than it can do."""

    capacity_per_s: float
    peak: OpenResult
    flooded: OpenResult
    resident_mb: tuple[float, float]
    after: OpenResult


def overload(bench: Bench) -> Row:
    """Offer each stack three times its own capacity: ours with and without rerank, and the naive orchestration."""
    duration_s = bench.effort.seconds(60, least=8)
    row = Row(
        "overload",
        f"{TIMES:g}× capacity for {duration_s:g} s",
        f"Capacity is the rate of a closed loop with {CLIENTS} clients ({RERANK_CLIENTS} with rerank); the peak is the goodput "
        f"of an open loop at that rate, for a third of the time; then {TIMES:g}× that rate. Poisson arrivals, distinct "
        f"questions, cache bypassed; good is a 200 within {DEADLINE_MS} ms, counted from when it was due. The generator runs "
        "on the same cores. To reach: goodput ≥ 80 % of the peak, no queue growth after, resident memory flat.",
        _HEADER,
    )
    ours = next(stack for stack in bench.stacks if stack.name == OURS)
    for what, clients, reranked in (("no rerank", CLIENTS, False), ("rerank of 30", RERANK_CLIENTS, True)):
        flood = _flood(bench, ours, Stretch(clients, duration_s), _patience(cache=False, rerank=reranked))
        _add(row, f"{OURS}, {what}", flood, duration_s)
    for stack in bench.stacks:
        if stack is not ours:
            flood = _flood(bench, stack, Stretch(CLIENTS, duration_s), lambda _timeout_ms: {"rerank": False})
            _add(row, f"{stack.name}, no rerank", flood, duration_s)
    return row


def _patience(**fields: Any) -> Callable[[int], dict[str, Any]]:
    return lambda timeout_ms: {**fields, "timeout_ms": timeout_ms}


def _flood(bench: Bench, stack: Stack, load: Stretch, fields: Callable[[int], dict[str, Any]]) -> _Flood:
    """Offer *stack* what it can do, three times that, and a little; *fields* are a request's for a `timeout_ms`."""
    calm = Stretch(load.connections, max(3.0, load.duration_s / 6))
    capacity_per_s = bench.stretch(stack, calm, **fields(_PATIENT_MS)).per_s
    with only(stack) as front:
        asked = asking(front, **fields(DEADLINE_MS))
        peak = _offer(bench, asked, capacity_per_s, load.duration_s / 3)
        before_mb = stack.resident_mb()
        flooded = _offer(bench, asked, TIMES * capacity_per_s, load.duration_s)
        after_mb = stack.resident_mb()
        after = _offer(bench, asked, _AFTER_SHARE * capacity_per_s, _AFTER_S)
    return _Flood(capacity_per_s, peak, flooded, (before_mb, after_mb), after)


def _offer(bench: Bench, asked: Running, rate_per_s: float, duration_s: float) -> OpenResult:
    questions = bench.questions.take(int(rate_per_s * duration_s * 1.1) + 100)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as directory:
        bodies = Path(directory) / "bodies"
        bodies.write_bytes(b"\n".join(asked.spec.body([question], {}) for question in questions))
        plan = OpenPlan(asked.host, asked.port, "/search", str(bodies), rate_per_s, duration_s, DEADLINE_MS)
        return run(plan)


def _add(row: Row, name: str, flood: _Flood, duration_s: float) -> None:
    flooded, peak, after = flood.flooded, flood.peak, flood.after
    answers = [f"{status} {count}" for status, count in sorted(flooded.statuses.items())]
    degraded = [f"{reason} {count}" for reason, count in sorted(flooded.degraded.items())]
    row.lines.append(
        (
            name,
            number(flood.capacity_per_s),
            number(peak.goodput_per_s),
            number(flooded.offered_per_s),
            number(flooded.goodput_per_s),
            f"{flooded.goodput_per_s / peak.goodput_per_s:.0%}" if peak.goodput_per_s else "",
            f"{number(flooded.p50_ms)} / {number(flooded.p99_ms)}",
            ", ".join([*answers, *degraded]),
            " → ".join(number(mb) for mb in flood.resident_mb),
            f"{after.goodput_per_s / after.offered_per_s:.0%}, {number(after.p50_ms)} / {number(after.p99_ms)}",
            number(flooded.cpu_s / duration_s),
        )
    )
    row.findings.append(f"{name}: goodput by second {_thinned(flooded.good_by_second)}")
    if flooded.late_p99_ms > DEADLINE_MS / 10:
        row.findings.append(f"{name}: the generator itself sent {flooded.late_p99_ms:.0f} ms late (p99)")


def _thinned(by_second: Sequence[int], most: int = 12) -> str:
    step = max(1, -(-len(by_second) // most))
    return ", ".join(str(count) for count in by_second[::step])
