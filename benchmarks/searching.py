"""Whole searches beside the naive orchestration: alone, with many clients, from the result cache, and reranked."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.corpus import Questions
from benchmarks.effort import Effort
from benchmarks.figures import Spread, number, ratio, spread
from benchmarks.load import LoadFailed, LoadResult, Stretch, hammer
from benchmarks.report import Row
from benchmarks.servers import OURS, Running
from benchmarks.stack import Stack, asking, only

CLIENTS = 16
LEVELS = (1, 2, 4, 8, 16, 32, 64)
REPEATED = 64
CACHE_CLIENTS = 32

_MOST_PER_CLIENT_PER_S, _MOST_PER_S = 300, 600  # More than any stack answers here; each question serves once.
_LINE = ("stack", "requests/s", "p50 ms", "p99 ms", "ours / it, requests/s")


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs: how long, who is asked, with which questions, and by what (wrk's path, or None)."""

    effort: Effort
    stacks: Sequence[Stack]
    questions: Questions
    wrk: str | None

    def stretch(self, stack: Stack, stretch: Stretch, **fields: Any) -> LoadResult:
        """Ask *stack* alone, all others stopped, questions that nobody was asked before."""
        per_s = min(_MOST_PER_S, stretch.connections * _MOST_PER_CLIENT_PER_S)
        distinct = [[question] for question in self.questions.take(int(per_s * (stretch.duration_s + 1)))]
        with only(stack) as front:
            self.settle(asking(front, **fields))
            return hammer(asking(front, **fields), distinct, stretch, self.wrk)

    def settle(self, front: Running) -> None:
        """Ask a few questions before the clock starts: connections were closed while the stack stood still."""
        for question in self.questions.take(20):
            front.ask([question])


def one_client(bench: Bench) -> Row:
    """Hybrid search without rerank, by one client, of questions that were never asked."""
    duration_s = bench.effort.seconds(6)
    row = Row(
        "cold",
        "hybrid, no rerank, cold cache, 1 client",
        f"{bench.effort.rounds} rounds of {duration_s:g} s per stack in turn, the others stopped; distinct questions, result "
        f"and vector caches on and never hit; {sender(bench.wrk)}. To reach: p50 ≤ 6 ms, p99 ≤ 20 ms.",
        _LINE,
    )
    results = _compare(row, bench, Stretch(1, duration_s), rerank=False)
    row.bars["p50 ms"] = _spread_of(results, "p50_ms")
    return row


def many_clients(bench: Bench) -> Row:
    """Hybrid search without rerank, by 16 clients, and the curve from 1 to 64."""
    duration_s = bench.effort.seconds(6)
    row = Row(
        "load",
        f"hybrid, no rerank, {CLIENTS} clients, distinct questions",
        f"{bench.effort.rounds} rounds of {duration_s:g} s per stack in turn, the others stopped; {sender(bench.wrk)}. The "
        f"curves: {', '.join(map(str, LEVELS))} clients for {duration_s:g} s each. To reach: ≥ 300 requests/s and ≥ 3× the naive "
        "orchestration, p99 ≤ 100 ms.",
        _LINE,
    )
    results = _compare(row, bench, Stretch(CLIENTS, duration_s), rerank=False)
    row.bars["requests/s"] = _spread_of(results, "per_s")
    for stack in bench.stacks:
        _add_curve(row, bench, stack, duration_s)
    return row


def _add_curve(row: Row, bench: Bench, stack: Stack, duration_s: float) -> None:
    lines = row.paths.setdefault(f"latency by load, {LEVELS[0]} to {LEVELS[-1]} clients, hybrid without rerank", {})
    row.axes = ("requests/s", "ms")
    points = []
    for level in LEVELS:
        try:
            found = bench.stretch(stack, Stretch(level, duration_s), rerank=False)
        except LoadFailed as failure:
            points.append(f"{level}: {failure}")
            continue
        lines.setdefault(f"{stack.name} p50", []).append((found.per_s, found.p50_ms))
        lines.setdefault(f"{stack.name} p99", []).append((found.per_s, found.p99_ms))
        points.append(f"{level}: {number(found.per_s)}/s, {number(found.p50_ms)}, {number(found.p99_ms)} ms")
    row.findings.append(f"{stack.name}, clients: requests/s, p50, p99: {'; '.join(points)}")


def reranked(bench: Bench) -> Row:
    """Hybrid search with rerank of 30, by one client."""
    duration_s = bench.effort.seconds(15, least=4)
    row = Row(
        "rerank",
        "hybrid + rerank of 30, 1 client",
        f"{bench.effort.rounds} rounds of {duration_s:g} s per stack in turn, the others stopped; distinct questions, so most "
        f"documents are new to the reranker's cache; {sender(bench.wrk)}. To reach: p50 ≤ 150 ms.",
        _LINE,
    )
    results = _compare(row, bench, Stretch(1, duration_s), rerank=True)
    row.bars["p50 ms"] = _spread_of(results, "p50_ms")
    return row


def cached(
    effort: Effort,
    questions: Questions,
    wrk: str | None,
    started: Callable[..., AbstractContextManager[Stack]],
    kinds: Mapping[str, Mapping[str, str]],
) -> Row:
    """
    Searches that were asked before, by 32 clients.

    *kinds* names stacks with the settings that say where their cache is, the first of them nowhere; *started* runs one.
    They work on the same data, so they run one after the other.
    """
    duration_s = effort.seconds(5)
    row = Row(
        "cache",
        f"result cache hit, {CACHE_CLIENTS} clients",
        f"{effort.rounds} rounds of {duration_s:g} s of one stack after the other; {REPEATED} searches, hybrid without "
        f"rerank, asked again and again; {sender(wrk)}. To reach: ≥ 2,500 requests/s in the process, ≥ 1,200 through "
        "Redis, p99 ≤ 40 ms.",
        ("cache", "requests/s", "p50 ms", "p99 ms", "it / no cache, requests/s"),
    )
    repeated = [[question] for question in questions.take(REPEATED)]
    results: dict[str, list[LoadResult]] = {}
    for name, environ in kinds.items():
        with started(name, **environ) as stack:
            asked = asking(stack.front, rerank=False)
            for question in repeated:
                asked.ask(question)
            stretch = Stretch(CACHE_CLIENTS, duration_s)
            results[name] = [hammer(asked, repeated, stretch, wrk, repeat=True) for _ in range(effort.rounds)]
    first = next(iter(results))
    for name, found in results.items():
        rates = [one.per_s for one in found]
        beside = "" if name == first else f"{ratio(rates, [one.per_s for one in results[first]])}×"
        row.lines.append((name, *figures(found), beside))
    row.bars["requests/s"] = _spread_of(results, "per_s")
    return row


def steps_down(front: Running) -> dict[str, float]:
    """Return how many answers so far were degraded, by reason; nothing for a server that does not count them."""
    families = text_string_to_metric_families((front.read("/metrics") or b"").decode())
    samples = [sample for family in families for sample in family.samples]
    return {each.labels["reason"]: each.value for each in samples if each.name == "tercet_search_degraded_total"}


def figures(found: Sequence[LoadResult]) -> tuple[str, str, str]:
    """Return requests per second, p50 and p99 of several rounds as the report has them."""
    rates, medians, tails = ([getattr(one, name) for one in found] for name in ("per_s", "p50_ms", "p99_ms"))
    return str(spread(rates)), str(spread(medians)), str(spread(tails))


def sender(wrk: str | None) -> str:
    """Return who sends the requests, for the report."""
    return "wrk on the same cores" if wrk else "the asyncio client, which takes a core"


def _compare(row: Row, bench: Bench, stretch: Stretch, **fields: Any) -> dict[str, list[LoadResult]]:
    """Measure round by round, write a line for each stack, and note which answers of ours were degraded."""
    results: dict[str, list[LoadResult]] = defaultdict(list)
    before = _our_steps_down(bench)
    for _ in range(bench.effort.rounds):
        for stack in bench.stacks:
            results[stack.name].append(bench.stretch(stack, stretch, **fields))
    after = _our_steps_down(bench)
    ours = [one.per_s for one in results[OURS]]
    for name, found in results.items():
        beside = "" if name == OURS else f"{ratio(ours, [one.per_s for one in found])}×"
        row.lines.append((name, *figures(found), beside))
    answered = sum(one.requests for one in results[OURS])
    degraded = [f"{reason} {count - before.get(reason, 0):.0f}" for reason, count in after.items()]
    named = ", ".join(each for each in degraded if not each.endswith(" 0"))
    row.findings.append(f"{OURS}: of {answered:,} answers degraded: {named or 'none'}")
    return results


def _our_steps_down(bench: Bench) -> dict[str, float]:
    ours = next(stack for stack in bench.stacks if stack.name == OURS)
    with only(ours) as front:
        return steps_down(front)


def _spread_of(results: Mapping[str, Sequence[LoadResult]], quantity: str) -> dict[str, Spread]:
    return {name: spread([getattr(one, quantity) for one in found]) for name, found in results.items()}
