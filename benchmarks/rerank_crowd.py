"""Sixteen clients with more pairs than can be scored by their deadlines: how much is scored, for whom, and how late."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.client import Plan
from benchmarks.effort import Effort
from benchmarks.figures import number, percentile, ratio, spread
from benchmarks.load import PATIENCE_S, LoadFailed
from benchmarks.machine import ROOT
from benchmarks.report import Row
from benchmarks.rerank_client import Outcome
from benchmarks.rerank_inprocess import measure_apart
from benchmarks.rerank_servers import requests
from benchmarks.servers import OURS, Running

CLIENTS = 16
DOCUMENTS = 20
DEADLINE_MS = 500
MOST_PER_CLIENT_PER_S = 6  # Requests are made for this many: a deadline is two a second, a quick refusal more.

_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Shares:
    """
    What a stretch of *outcomes* came to.

    A request's fair share is what the requests scored on average; one whose documents were all scored had all it asked for.
    *least* is the smallest share in it, *under_half* how many requests had less than half, of *requests* in all.
    """

    pairs_per_s: float
    fair: float
    least: float
    under_half: int
    requests: int


def shares(outcomes: Sequence[Outcome], *, start_s: float, end_s: float, documents: int) -> Shares:
    """
    Return what the requests came to that ended from *start_s* to *end_s*.

    As many were under way at the one moment as at the other, so the rate counts what was scored between them. Raises
    LoadFailed when nothing was scored.
    """
    counted = [outcome for outcome in outcomes if start_s <= outcome.ended_s <= end_s]
    scored = sum(outcome.scored for outcome in counted)
    if not scored:
        raise LoadFailed(f"of {len(counted)} requests none had a document scored")
    fair = scored / len(counted)
    parts = [1.0 if outcome.scored == documents else outcome.scored / fair for outcome in counted]
    return Shares(scored / (end_s - start_s), fair, min(parts), sum(part < 0.5 for part in parts), len(parts))


def crowd(effort: Effort, server: Running, model: Path) -> Row:
    """Sixteen clients with 20 pairs each and half a second, beside our own backend called without HTTP."""
    duration_s, alone_s = effort.seconds(30), effort.seconds(8)
    row = Row(
        "crowd",
        f"{CLIENTS} clients × {DOCUMENTS} pairs, `X-Deadline-Ms: {DEADLINE_MS}`",
        f"{effort.rounds} rounds: {alone_s:g} s of our backend called directly, tokenising included, in a process of its own, "
        f"then {duration_s:g} s of clients that ask again once answered; 128 tokens a pair, all distinct; the client's own "
        "clock, on the machine that works. To reach: scored pairs/s ≥ 85 % of in-process, no request below half its fair share "
        "(the mean), late by p99.9 ≤ 20 ms, worst ≤ 150 ms.",
        ("server", "scored pairs/s", "in process", "share", "pairs a request", "least of fair share", "under half"),
    )
    rates: list[float] = []
    in_process: list[float] = []
    stretches: list[Shares] = []
    outcomes: list[Outcome] = []
    for turn in range(effort.rounds):
        server.pause()
        apart = measure_apart("backend", model, documents=DOCUMENTS, duration_s=alone_s, seed=600 + turn)
        in_process.append(apart.pairs_per_s)
        server.resume()
        found = ask(server, duration_s, seed=600 + turn)
        stretch = shares(found, start_s=DEADLINE_MS / 1000, end_s=duration_s, documents=DOCUMENTS)
        rates.append(stretch.pairs_per_s)
        stretches.append(stretch)
        outcomes += found
    server.pause()
    row.lines.append(
        (
            OURS,
            str(spread(rates)),
            str(spread(in_process)),
            f"{ratio([rate * 100 for rate in rates], in_process)} %",
            str(spread([one.fair for one in stretches])),
            f"{min(one.least for one in stretches) * 100:.0f} %",
            f"{sum(one.under_half for one in stretches)} of {sum(one.requests for one in stretches):,}",
        )
    )
    row.findings += lateness(outcomes)
    row.bars["pairs/s"] = {OURS: spread(rates), "in process": spread(in_process)}
    return row


def lateness(outcomes: Sequence[Outcome]) -> list[str]:
    """Return lines on how late the answers came and what they were."""
    late = [max(0.0, outcome.latency_ms - DEADLINE_MS) for outcome in outcomes]
    tails = ", ".join(f"p{at:g} {number(percentile(late, at))} ms" for at in (50, 99, 99.9))
    said = Counter(
        "whole" if outcome.scored == DOCUMENTS else "partial" if outcome.status == 200 else str(outcome.status)
        for outcome in outcomes
    )
    answers = ", ".join(f"{name} {count:,}" for name, count in said.most_common())
    return [f"late, of {len(late):,} requests: {tails}, worst {number(max(late))} ms", f"answers: {answers}"]


def ask(server: Running, duration_s: float, seed: int) -> list[Outcome]:
    """
    Let the crowd ask *server* for *duration_s* and return what became of each request.

    Raises:
        LoadFailed: The client failed, or a request had to be sent twice.
    """
    count = round(CLIENTS * duration_s * MOST_PER_CLIENT_PER_S) + _WARM_UPS
    made = requests(count, DOCUMENTS, seed)
    for request in made[:_WARM_UPS]:
        server.ask(request)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as directory:
        bodies = Path(directory) / "bodies"
        bodies.write_bytes(b"\n".join(server.spec.body(request, {}) for request in made[_WARM_UPS:]))
        plan = Plan(
            server.host,
            server.port,
            server.spec.path,
            str(bodies),
            CLIENTS,
            duration_s,
            seed=seed,
            headers={"X-Deadline-Ms": str(DEADLINE_MS)},
        )
        ended = _run(plan)
    if ended.returncode:
        raise LoadFailed(f"the crowd's client failed: {ended.stderr.strip()[-500:]}")
    outcomes = [Outcome(**outcome) for outcome in json.loads(ended.stdout)]
    if len(outcomes) > count - _WARM_UPS:
        raise LoadFailed(f"{count - _WARM_UPS} distinct requests were too few for {len(outcomes)}")
    return outcomes


def _run(plan: Plan) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.rerank_client"],
            cwd=ROOT,
            input=json.dumps({"plan": asdict(plan), "spread_s": DEADLINE_MS / 1000}),
            capture_output=True,
            text=True,
            timeout=plan.duration_s + PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"no answer within {PATIENCE_S:.0f} s after the end") from None
