"""Requests one after the other: 50 pairs beside the machine's limit and the peers, and MaxSim on documents known before."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.effort import Effort
from benchmarks.figures import percentile, ratio, spread
from benchmarks.gemm import TOKENS as GEMM_TOKENS
from benchmarks.gemm import Limit
from benchmarks.gemm import measure_apart as gemm_apart
from benchmarks.load import LoadResult, Stretch, send
from benchmarks.report import Row
from benchmarks.rerank_inprocess import measure_apart
from benchmarks.rerank_servers import PAIR_TOKENS, QUERY_WORDS, requests
from benchmarks.servers import OURS, Running, alone
from benchmarks.texts import MARKERS, texts

PAIRS = 50
LIBRARY = "sentence-transformers, in process"

_WARM_UPS = 3
_MOST_CACHED_PER_S = 2000  # More than any server answers one by one; warm-ups that were held up foretell too few.


def idle(effort: Effort, servers: Mapping[str, Running], model: Path) -> Row:
    """One request of 50 pairs at a time, all distinct, beside bare GEMM, the library and Infinity."""
    duration_s, gemm_s = effort.seconds(8, least=3), effort.seconds(2)
    row = Row(
        "idle",
        f"{PAIRS} pairs × {PAIR_TOKENS} tokens, one request at a time",
        f"{effort.rounds} rounds of {duration_s:g} s per server in turn, the others stopped, after {gemm_s:g} s of bare bf16 "
        "GEMM at the model's shapes; all texts distinct, so that no cache is hit; client: asyncio. The library (fp32, "
        "`CrossEncoder.predict` with its defaults) is called without HTTP. To reach: ≤ 1.4× the GEMM limit, ≥ 1.6× faster than "
        "the library and ≥ 2× than Infinity.",
        ("server", "p50 ms", "pairs/s", "its p50 / GEMM limit", f"its p50 / {OURS}'s"),
    )
    p50_ms: dict[str, list[float]] = defaultdict(list)
    limits: list[Limit] = []
    for turn in range(effort.rounds):
        limits.append(gemm_apart(gemm_s))
        for name in servers:
            with alone(servers, name) as server:
                found = _one_after_another(server, duration_s, turn, _distinct)
            p50_ms[name].append(found.p50_ms)
        found_apart = measure_apart("predict", model, documents=PAIRS, duration_s=duration_s, seed=turn)
        p50_ms[LIBRARY].append(found_apart.p50_ms)
    bound = [limit_ms(limit) for limit in limits]
    for name, values in p50_ms.items():
        per_s = spread([PAIRS * 1000 / value for value in values])
        beside = "" if name == OURS or OURS not in p50_ms else f"{ratio(values, p50_ms[OURS])}×"
        row.lines.append((name, str(spread(values)), str(per_s), f"{ratio(values, bound)}×", beside))
    row.findings.append(
        f"GEMM limit: {spread(bound)} ms for the products of {PAIRS * PAIR_TOKENS:,} tokens by the median pass, "
        f"{spread([limit.gflop_per_s for limit in limits])} GFLOP/s"
    )
    row.bars["p50 ms"] = {name: spread(values) for name, values in p50_ms.items()} | {"GEMM limit": spread(bound)}
    return row


def limit_ms(limit: Limit) -> float:
    """Return how long the model's matrix products for one request of the row take at *limit*."""
    return PAIRS * PAIR_TOKENS / (limit.texts_per_s * GEMM_TOKENS) * 1000


def max_sim(effort: Effort, server: Running) -> Row:
    """Late interaction over 50 documents whose token vectors are kept, each time for another query."""
    duration_s = effort.seconds(3)
    row = Row(
        "maxsim",
        f"MaxSim on {PAIRS} cached documents of {PAIR_TOKENS} tokens, one request at a time",
        f"{effort.rounds} rounds of {duration_s:g} s; distinct queries of {QUERY_WORDS} words; client: asyncio. "
        "To reach: p50 ≤ 6 ms.",
        ("server", "requests/s", "p50 ms", "p99 ms"),
    )
    documents = texts(PAIRS, PAIR_TOKENS, seed=500)

    def with_known_documents(count: int, seed: int) -> list[list[str]]:
        return [[query, *documents] for query in texts(count, QUERY_WORDS + MARKERS, seed)]

    server.resume()
    turns = range(500, 500 + effort.rounds)
    results = [
        _one_after_another(server, duration_s, turn, with_known_documents, most_per_s=_MOST_CACHED_PER_S)
        for turn in turns
    ]
    server.pause()
    rates, medians, tails = ([getattr(one, name) for one in results] for name in ("per_s", "p50_ms", "p99_ms"))
    row.lines.append((OURS, str(spread(rates)), str(spread(medians)), str(spread(tails))))
    together = [latency for one in results for latency in one.latencies_ms]
    row.findings.append(f"p99 of all {len(together):,} requests together {percentile(together, 99):.2f} ms")
    row.bars["p50 ms"] = {OURS: spread(medians)}
    return row


def _distinct(count: int, seed: int) -> list[list[str]]:
    return requests(count, PAIRS, seed)


def _one_after_another(
    server: Running,
    duration_s: float,
    seed: int,
    made: Callable[[int, int], list[list[str]]],
    *,
    most_per_s: float = 0.0,
) -> LoadResult:
    """
    Send the requests that *made* returns for a count and a seed; the first of them warm up, the others are measured.

    There are twice as many as the fastest warm-up foretells, and enough for *most_per_s*.
    """
    alone_s = min(server.ask(request) for request in made(_WARM_UPS, seed))
    stretch = Stretch(1, duration_s).long_enough_for(alone_s)
    count = _WARM_UPS + math.ceil(stretch.duration_s * max(2 / alone_s, most_per_s)) + 2
    return send(server, made(count, seed)[_WARM_UPS:], stretch).result()
