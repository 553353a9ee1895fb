"""Vector search in the process, beside other databases: latency and recall by filter, and how they grow with the rows."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.databases import OURS, PEERS, Database
from benchmarks.effort import Effort
from benchmarks.figures import Spread, number, percentile, ratio, spread
from benchmarks.report import Row
from benchmarks.servers import ServerFailed
from benchmarks.vectors import FILTERS, LIMIT, Condition, VectorSet, recall

IN_SHARD = "tercet, in the shard"
_GOALS = {"no filter": (0.3, 0.985), "10 % filter": (1.0, 0.98), "1 % filter": (1.0, 0.99)}


def beside_databases(effort: Effort, vectors: VectorSet, rows: int, queries: int, scratch: Path) -> Row:
    """Load *rows* vectors into every database, then ask each the same questions, in turns."""
    row = Row(
        "latency",
        f"Top {LIMIT} of {rows:,} × {vectors.vectors.shape[1]} clustered vectors, one question after the other",
        f"{effort.rounds} rounds of {queries} new questions per database and filter in turn, the others stopped; every "
        "database in a process of its own, called in that process; recall against exact search over the same rows. "
        "The whole retrieval call is embedding excluded, from the router's `retrieve` to its answer. To reach, p50 in the "
        "shard: "
        + ", ".join(f"{name} ≤ {ms} ms at recall ≥ {least}" for name, (ms, least) in _GOALS.items())
        + "; ≤ 1.5 ms for the whole call without a filter.",
        ("filter", "database", "p50 ms", "p99 ms", "recall@10", "it / tercet"),
    )
    with ExitStack() as stack:
        databases = list(_loaded(stack, vectors, rows, scratch, row))
        for title, condition in FILTERS.items():
            truth = vectors.truth(rows, condition, effort.rounds * queries)
            measured = _rounds(effort, databases, condition, queries)
            ours = [percentile(times, 50) for times in measured[OURS].seconds]
            for name, found in measured.items():
                medians = [percentile(times, 50) for times in found.seconds]
                row.lines.append(
                    (
                        title,
                        name,
                        str(_ms(medians)),
                        str(_ms([percentile(times, 99) for times in found.seconds])),
                        f"{recall(found.rows, truth):.4f}",
                        "" if name in (OURS, IN_SHARD) else f"{ratio(medians, ours)}×",
                    )
                )
                row.bars.setdefault(f"p50 ms, {title}", {})[name] = _ms(medians)
    return row


class _Measured:
    """What one database found, and how long each question took by round."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.seconds: list[list[float]] = []


def _rounds(effort: Effort, databases: Sequence[Database], condition: Condition, queries: int) -> dict[str, _Measured]:
    measured: dict[str, _Measured] = {}
    for round_ in range(effort.rounds):
        for database in databases:
            database.resume()
            asked = range(round_ * queries, (round_ + 1) * queries)
            database.search(asked[:20], LIMIT, condition)  # Warm again after the stop.
            answer = database.search(asked, LIMIT, condition)
            database.pause()
            found = measured.setdefault(database.name, _Measured())
            found.rows += answer["rows"]
            found.seconds.append(answer["seconds"])
            if "shard_seconds" in answer:
                inside = measured.setdefault(IN_SHARD, _Measured())
                inside.rows += answer["rows"]
                inside.seconds.append(answer["shard_seconds"])
    return measured


def _loaded(stack: ExitStack, vectors: VectorSet, rows: int, scratch: Path, row: Row) -> Iterator[Database]:
    """Yield every database with the vectors in it, and stopped; a peer that fails is noted."""
    for name in (OURS, *PEERS):
        try:
            database = stack.enter_context(Database(name, scratch / name, vectors))
            loaded = database.ask("load", rows=rows)
        except ServerFailed as failure:
            if name == OURS:
                raise
            row.findings.append(f"{name} was not measured: {failure}")
            continue
        rate = rows / loaded["load_s"]
        row.findings.append(
            f"{name}: loaded {number(rate)} vectors/s, one thread of calls; then {loaded['finish_s']:.1f} s until all "
            f"indexes were built; memory {_memory(database)}"
        )
        database.pause()
        yield database


def growth(vectors: VectorSet, sizes: Sequence[int], queries: int, scratch: Path) -> Row:
    """Measure what *sizes* cost: latency, recall, memory, building, and starting from a snapshot."""
    row = Row(
        "growth",
        "Cost as the rows grow, one shard",
        f"{queries} questions without a filter one after the other; ready is from the start of the process to its first "
        "answer, from the snapshot; memory after that. To reach at 1,000,000: p50 ≤ 1 ms in the shard "
        "at recall ≥ .95, anonymous memory ≤ 1,200 MB, ready ≤ 10 s.",
        (
            "rows",
            "loaded vectors/s",
            "built s",
            "p50 ms in shard",
            "p50 ms whole",
            "recall@10",
            "anonymous MB",
            "resident MB",
            "ready s",
        ),
    )
    for size in sizes:
        directory = scratch / f"growth-{size}"
        with _fresh(directory, vectors) as database:
            loaded = database.ask("load", rows=size)
        began = time.perf_counter()
        with Database(OURS, directory, vectors, "--shards", "1") as database:
            database.search(range(1), LIMIT, None)
            ready_s = time.perf_counter() - began
            database.search(range(queries), LIMIT, None)
            answer = database.search(range(queries), LIMIT, None)
            memory = database.memory_mb()
        truth = vectors.truth(size, None, queries)
        in_shard_ms = percentile(answer["shard_seconds"], 50) * 1e3
        row.lines.append(
            (
                f"{size:,}",
                number(size / loaded["load_s"]),
                number(loaded["finish_s"]),
                number(in_shard_ms),
                number(percentile(answer["seconds"], 50) * 1e3),
                f"{recall(answer['rows'], truth):.4f}",
                number(memory["anonymous"]),
                number(memory["resident"]),
                number(ready_s),
            )
        )
        for quantity, value in (
            ("p50 ms in the shard", in_shard_ms),
            ("anonymous MB", memory["anonymous"]),
            ("seconds to build", loaded["load_s"] + loaded["finish_s"]),
        ):
            row.bars.setdefault(quantity, {})[f"{size:,}"] = Spread(value, value, value)
    return row


def fallback(vectors: VectorSet, rows: int, queries: int, scratch: Path) -> Row:
    """Compare the fallback index's small form of *rows* vectors with the shards' own."""
    row = Row(
        "fallback",
        f"The fallback index beside a shard, {rows:,} rows",
        f"The same {queries} questions to both, each in a process of its own that started from its snapshot; memory is what is "
        "resident after them, less an empty process's. To reach: recall@10 ≥ .95 of the shard's answer at ≤ 35 % of its memory.",
        ("form", "p50 ms in shard", "recall@10 of the shard's answer", "MB", "share"),
    )
    with Database(OURS, scratch / "fallback-none", vectors) as database:
        empty_mb = database.memory_mb()["resident"]
    answers: dict[str, dict[str, Any]] = {}
    memory_mb: dict[str, float] = {}
    for name, options in (("shard", ()), ("fallback", ("--compact",))):
        directory = scratch / f"fallback-{name}"
        with Database(OURS, directory, vectors, *options) as database:
            database.ask("load", rows=rows)
        with Database(OURS, directory, vectors, *options) as database:
            database.search(range(queries), LIMIT, None)
            answers[name] = database.search(range(queries), LIMIT, None)
            memory_mb[name] = database.memory_mb()["resident"] - empty_mb
    healthy = [set(found) for found in answers["shard"]["rows"]]
    for name, answer in answers.items():
        row.lines.append(
            (
                name,
                number(percentile(answer["shard_seconds"], 50) * 1e3),
                f"{recall(answer['rows'], healthy):.4f}",
                number(memory_mb[name]),
                f"{100 * memory_mb[name] / memory_mb['shard']:.0f} %",
            )
        )
    return row


@contextmanager
def _fresh(directory: Path, vectors: VectorSet) -> Iterator[Database]:
    with Database(OURS, directory, vectors, "--shards", "1") as database:
        yield database


def _memory(database: Database) -> str:
    memory = database.memory_mb()
    return f"{number(memory['resident'])} MB resident, {number(memory['anonymous'])} MB of it anonymous"


def _ms(seconds: Sequence[float]) -> Spread:
    return spread([value * 1e3 for value in seconds])
