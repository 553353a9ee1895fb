"""Rows 1 to 3: short texts from many clients, long texts in batches, one short text at a time; beside the peers."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

from benchmarks.effort import Effort
from benchmarks.figures import number, percentile, ratio, spread
from benchmarks.gemm import TOKENS as GEMM_TOKENS
from benchmarks.gemm import measure_apart
from benchmarks.load import LoadResult, Stretch, hammer, send
from benchmarks.report import Row
from benchmarks.servers import OURS, Running, alone
from benchmarks.texts import LONG_TOKENS, SHORT_TOKENS, texts

SHORT_CLIENTS = 32
BATCH_CLIENTS = 4
BATCH_TEXTS = 32
IDLE_PAUSE_S = 0.01
MOST_REQUESTS = 200_000
LEAST_TOKENS_PER_S = 40_000  # Requests are made for at least this speed, should the lone ones have been held up.

assert GEMM_TOKENS == LONG_TOKENS


def prepare(
    server: Running, stretch: Stretch, *, texts_each: int, tokens: int, seed: int
) -> tuple[list[list[str]], Stretch]:
    """
    Warm *server* up with requests of this shape; return enough distinct ones for *stretch*, and it, longer if need be.

    Enough is twice what it would answer if each connection were served as fast as a lone one.
    """
    warm = texts(3 * texts_each, tokens, seed=-1 - seed)
    times_s = []
    for start in range(0, len(warm), texts_each):
        times_s.append(server.ask(warm[start : start + texts_each]))
    alone_s = min(times_s)
    if texts_each > 1:  # Short texts of many connections share batches, and end by the thousand anyway.
        stretch = stretch.long_enough_for(alone_s)
    estimate = 2 * math.ceil(stretch.connections * (1 + stretch.duration_s / alone_s))
    least = math.ceil(LEAST_TOKENS_PER_S * stretch.duration_s / (tokens * texts_each))
    count = min(MOST_REQUESTS, max(estimate, least))
    made = texts(count * texts_each, tokens, seed)
    return [made[start : start + texts_each] for start in range(0, len(made), texts_each)], stretch


def short_texts(effort: Effort, servers: Mapping[str, Running], wrk: str | None) -> Row:
    """One short text per request from 32 clients, all distinct, cache off."""
    duration_s = float(round(effort.seconds(8)))  # wrk takes whole seconds
    row = Row(
        "short",
        "1 short text per request, 32 clients, all distinct, cache off",
        f"{effort.rounds} rounds of {duration_s:g} s per server in turn, the others stopped; client: "
        f"{'wrk, one thread' if wrk else 'asyncio'}; {SHORT_TOKENS} tokens a text. "
        "To reach: ≥ 5.5× Infinity, > 1,000 req/s, p99 < 50 ms.",
        ("server", "requests/s", "p50 ms", "p99 ms", f"{OURS} / it"),
    )
    stretch = Stretch(SHORT_CLIENTS, duration_s)
    texts_for_warmth = [[text] for text in texts(4 * SHORT_CLIENTS, SHORT_TOKENS, seed=-1000)]
    results: dict[str, list[LoadResult]] = defaultdict(list)
    for turn in range(effort.rounds):
        for name in servers:
            with alone(servers, name) as server:
                requests, fitted = prepare(server, stretch, texts_each=1, tokens=SHORT_TOKENS, seed=turn)
                send(server, texts_for_warmth, Stretch(SHORT_CLIENTS, 1.0), pause_s=0.001, repeat=True).result()
                results[name].append(hammer(server, requests, fitted, wrk))
    _add_latency_lines(row, results, lambda one: one.per_s)
    row.bars["requests/s"] = {name: spread([one.per_s for one in results[name]]) for name in results}
    row.bars["p99 ms"] = {name: spread([one.p99_ms for one in results[name]]) for name in results}
    return row


def long_texts(effort: Effort, servers: Mapping[str, Running], wrk: str | None) -> Row:
    """Thirty-two distinct texts of ~130 tokens per request from 4 clients, cache off, beside the machine's GEMM limit."""
    duration_s, gemm_s = effort.seconds(10, least=4), effort.seconds(2)
    row = Row(
        "long",
        "32 distinct texts of ~130 tokens per request, 4 clients, cache off",
        f"{effort.rounds} rounds of {duration_s:g} s per server in turn, the others stopped, after {gemm_s:g} s of bare "
        "bf16 GEMM at the model's shapes; client: asyncio, first wave and unfinished requests not counted. "
        "To reach: ≥ 4.5× Infinity, ≥ 75 % of the GEMM limit.",
        ("server", "texts/s", "request p50 ms", "share of GEMM limit", f"{OURS} / it"),
    )
    stretch = Stretch(BATCH_CLIENTS, duration_s)
    rates: dict[str, list[float]] = defaultdict(list)
    p50_ms: dict[str, list[float]] = defaultdict(list)
    limits = []
    for turn in range(effort.rounds):
        limits.append(measure_apart(gemm_s))
        for name in servers:
            with alone(servers, name) as server:
                requests, fitted = prepare(server, stretch, texts_each=BATCH_TEXTS, tokens=LONG_TOKENS, seed=turn)
                result = send(server, requests, fitted).result()
            rates[name].append(result.per_s * BATCH_TEXTS)
            p50_ms[name].append(result.p50_ms)
    bound = [limit.texts_per_s for limit in limits]
    for name, values in rates.items():
        share = ratio([value * 100 for value in values], bound)
        beside = "" if name == OURS or OURS not in rates else f"{ratio(rates[OURS], values)}×"
        row.lines.append((name, str(spread(values)), str(spread(p50_ms[name])), f"{share} %", beside))
    row.findings.append(
        f"GEMM limit: {spread(bound)} texts/s by the median pass ({spread([limit.best_texts_per_s for limit in limits])} by the "
        f"fastest), {spread([limit.gflop_per_s for limit in limits])} GFLOP/s"
    )
    row.bars["texts/s"] = {name: spread(values) for name, values in rates.items()} | {"GEMM limit": spread(bound)}
    return row


def idle(effort: Effort, servers: Mapping[str, Running], wrk: str | None) -> Row:
    """One short text at a time on an otherwise idle server."""
    how = "one asyncio client that sends the next request when the last is answered. To reach: p50 ≤ 3 ms."
    return _one_at_a_time("idle", "1 short text, idle", how, effort, servers, pause_s=0.0)


def paused(effort: Effort, servers: Mapping[str, Running], wrk: str | None) -> Row:
    """As `idle`, with pauses that are long enough for the cores to go to sleep."""
    how = f"as above, but the client pauses {IDLE_PAUSE_S * 1000:g} ms between requests, and the cores go to sleep."
    return _one_at_a_time("paused", "1 short text, now and then", how, effort, servers, pause_s=IDLE_PAUSE_S)


def _one_at_a_time(
    name: str, title: str, how: str, effort: Effort, servers: Mapping[str, Running], *, pause_s: float
) -> Row:
    duration_s = effort.seconds(5, least=2)
    row = Row(
        name,
        title,
        f"{effort.rounds} rounds of {duration_s:g} s per server in turn, the others stopped; {how}",
        ("server", "requests/s", "p50 ms", "p99 ms", f"its p50 / {OURS}'s"),
    )
    stretch = Stretch(1, duration_s)
    results: dict[str, list[LoadResult]] = defaultdict(list)
    for turn in range(effort.rounds):
        for server_name in servers:
            with alone(servers, server_name) as server:
                requests, fitted = prepare(server, stretch, texts_each=1, tokens=SHORT_TOKENS, seed=100 + turn)
                results[server_name].append(send(server, requests, fitted, pause_s=pause_s).result())
    _add_latency_lines(row, results, lambda one: 1 / one.p50_ms)
    for server_name, stretches in results.items():
        pooled = [latency for one in stretches for latency in one.latencies_ms]
        row.findings.append(
            f"{server_name}: p99 of all {len(pooled):,} requests together {number(percentile(pooled, 99))} ms"
        )
    row.bars["p50 ms"] = {each: spread([one.p50_ms for one in results[each]]) for each in results}
    return row


def _add_latency_lines(row: Row, results: Mapping[str, list[LoadResult]], speed: Callable[[LoadResult], float]) -> None:
    speeds = {name: [speed(one) for one in stretches] for name, stretches in results.items()}
    for name, stretches in results.items():
        per_s = spread([one.per_s for one in stretches])
        p50, p99 = spread([one.p50_ms for one in stretches]), spread([one.p99_ms for one in stretches])
        beside = "" if name == OURS or OURS not in speeds else f"{ratio(speeds[OURS], speeds[name])}×"
        row.lines.append((name, str(per_s), str(p50), str(p99), beside))
