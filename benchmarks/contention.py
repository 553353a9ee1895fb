"""Row 4: queries while a bulk job saturates the service. Row 5: resident memory under a mixed load."""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping

from benchmarks.effort import Effort
from benchmarks.figures import number, percentile, ratio, slope_per_minute, spread
from benchmarks.load import LONGEST_S, LoadFailed, Sending, Stretch, send
from benchmarks.report import Row
from benchmarks.servers import NAIVE, OURS, Running, alone
from benchmarks.texts import LONG_TOKENS, SHORT_TOKENS, mixed_texts, texts
from benchmarks.throughput import prepare

QUERIES_PER_S = 20.0
QUERY_CONNECTIONS = 4  # Opened beforehand; more are opened when slow answers keep them all busy.
BULK_CONNECTIONS = 2
BULK_TEXTS = 64
HEAD_START_S = 1.0  # The bulk job saturates the service before the first query.

MIXED_TEXTS = 4_000
MIXED_EACH = 16


def queries_amid_bulk(effort: Effort, servers: Mapping[str, Running], wrk: str | None) -> Row:
    """Twenty short queries per second while a bulk job saturates the service; what each costs the other."""
    solo_s, both_s = effort.seconds(8, least=4), effort.seconds(12, least=5)
    compared = [name for name in servers if name != NAIVE]
    row = Row(
        "bulk",
        "20 short queries/s while a bulk job saturates the service",
        f"{effort.rounds} rounds per server in turn: {solo_s:g} s of bulk alone ({BULK_CONNECTIONS} connections, {BULK_TEXTS} × "
        f"~{LONG_TOKENS} tokens each), then {both_s:g} s of bulk with queries at Poisson times, latency from the "
        "intended start; two asyncio clients. To reach: query p99 ≤ 40 ms, bulk keeps ≥ 65 %.",
        ("server", "query p50 ms", "query p99 ms", "bulk texts/s", "bulk alone texts/s", "bulk keeps"),
    )
    solo = Stretch(BULK_CONNECTIONS, solo_s)
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in compared}
    pooled: dict[str, list[float]] = defaultdict(list)
    for turn in range(effort.rounds):
        queries = [[text] for text in texts(round(2 * QUERIES_PER_S * LONGEST_S), SHORT_TOKENS, seed=200 + turn)]
        for name in compared:
            lane = {"lane": "bulk"} if name == OURS else {}
            with alone(servers, name) as server:
                bulk, lone = prepare(server, solo, texts_each=BULK_TEXTS, tokens=LONG_TOKENS, seed=200 + turn)
                both = Stretch(BULK_CONNECTIONS, max(both_s, lone.duration_s))
                alone_per_s = send(server, bulk, lone, fields=lane).result().per_s * BULK_TEXTS
                job = send(server, bulk, both, fields=lane)
                time.sleep(HEAD_START_S)
                asked = Stretch(QUERY_CONNECTIONS, both.duration_s - HEAD_START_S)
                answers = send(server, queries, asked, rate_per_s=QUERIES_PER_S, seed=turn).result()
                kept_per_s = job.result().per_s * BULK_TEXTS
            taken = {"p50": answers.p50_ms, "p99": answers.p99_ms, "solo": alone_per_s, "kept": kept_per_s}
            for quantity, value in taken.items():
                figures[name][quantity].append(value)
            pooled[name] += answers.latencies_ms
    for name, taken_by in figures.items():
        spreads = [str(spread(taken_by[quantity])) for quantity in ("p50", "p99", "kept", "solo")]
        keeps = ratio([value * 100 for value in taken_by["kept"]], taken_by["solo"])
        row.lines.append((name, *spreads, f"{keeps} %"))
        together = number(percentile(pooled[name], 99))
        row.findings.append(f"{name}: query p99 of all {len(pooled[name]):,} queries together {together} ms")
    row.bars["query p99 ms"] = {name: spread(figures[name]["p99"]) for name in compared}
    return row


def mixed_load(effort: Effort, server: Running) -> Row:
    """Queries, documents of all lengths and long requests for minutes: does resident memory stay where it was?"""
    measured_s, warm_up_s = effort.mixed_s, max(10.0, effort.mixed_s / 10)
    row = Row(
        "memory",
        f"{measured_s / 60:g} minutes of mixed load",
        f"After {warm_up_s:g} s of the same load: {QUERIES_PER_S / 2:g} short queries/s, 2 connections with {MIXED_EACH} "
        f"texts of 6 to 250 tokens each, 1 with 32 × ~{LONG_TOKENS} tokens and a pause; "
        "VmRSS of the service's processes every second. "
        "To reach: flat (slope by least squares).",
        ("resident at the start MB", "at the end MB", "most MB", "slope MB/min", "requests"),
    )
    server.resume()
    for part in _mixed(server, warm_up_s, seed=300):
        part.result()
    began = time.monotonic()
    parts = _mixed(server, measured_s, seed=301)
    results: list[int] = []
    failures: list[LoadFailed] = []

    def wait() -> None:
        for part in parts:
            try:
                results.append(part.result().requests)
            except LoadFailed as failure:
                failures.append(failure)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while waiting.is_alive() and time.monotonic() < began + measured_s:
        row.curve.append((time.monotonic() - began, server.resident_mb()))
        waiting.join(1.0)
    waiting.join()
    server.pause()
    if failures:
        raise failures[0]
    seconds, resident = [second for second, _ in row.curve], [mb for _, mb in row.curve]
    slope = f"{slope_per_minute(seconds, resident):+.3f}"
    row.lines.append((number(resident[0]), number(resident[-1]), number(max(resident)), slope, f"{sum(results):,}"))
    return row


def _mixed(server: Running, duration_s: float, *, seed: int) -> list[Sending]:
    queries = [[text] for text in texts(round(QUERIES_PER_S * duration_s) + 100, SHORT_TOKENS, seed)]
    documents = mixed_texts(MIXED_TEXTS, seed)
    groups = [documents[start : start + MIXED_EACH] for start in range(0, len(documents), MIXED_EACH)]
    long = texts(32 * 64, LONG_TOKENS, seed)
    batches = [long[start : start + 32] for start in range(0, len(long), 32)]
    return [
        send(server, queries, Stretch(2, duration_s), rate_per_s=QUERIES_PER_S / 2, seed=seed),
        send(server, groups, Stretch(2, duration_s), pause_s=0.001, repeat=True),
        send(server, batches, Stretch(1, duration_s), pause_s=0.5, repeat=True),
    ]
