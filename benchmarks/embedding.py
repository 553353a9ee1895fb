"""`python -m benchmarks.embedding`: the embedding service's figures, beside its peers, in one run (see RESULTS.md)."""

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPException
from pathlib import Path

from benchmarks import machine, report
from benchmarks.caching import cache_hits
from benchmarks.contention import mixed_load, queries_amid_bulk
from benchmarks.effort import FULL, QUICK, Effort
from benchmarks.gpu import gpu
from benchmarks.load import LoadFailed, find_wrk
from benchmarks.report import Row
from benchmarks.servers import OURS, Running, ServerFailed, ServerSpec, model_directory, peers, running, tercet
from benchmarks.texts import LONG_TOKENS, SHORT_TOKENS, check_lengths, model_token_counter, texts
from benchmarks.throughput import idle, long_texts, paused, short_texts

BESIDE_PEERS: dict[str, Callable[[Effort, Mapping[str, Running], str | None], Row]] = {
    "short": short_texts,
    "long": long_texts,
    "idle": idle,
    "paused": paused,
    "bulk": queries_amid_bulk,
}
ALONE = ("memory", "cache", "gpu")
NO_CACHE = {"EMBEDDING_CACHE_BYTES": "0"}
SMALL_CACHE = {"EMBEDDING_CACHE_BYTES": str(2**21)}  # Full before the warm-up ends, so that its growth is no slope.


class Session:
    """One run: measures the rows asked for, and goes on with the next when one fails."""

    def __init__(self, effort: Effort, names: Sequence[str], logs: Path) -> None:
        self._effort = effort
        self._names = names
        self._logs = logs
        self._wrk = find_wrk()
        self.facts: list[str] = []
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def run(self) -> None:
        """Measure; each row is printed when it is done."""
        wanted = [name for name in BESIDE_PEERS if name in self._names]
        if wanted:
            specs = [tercet(**NO_CACHE), *peers()]
            for name, servers in self._with_servers(specs, wanted):
                self._keep(name, partial(BESIDE_PEERS[name], self._effort, servers, self._wrk))
        if "memory" in self._names:
            for name, servers in self._with_servers([tercet(**SMALL_CACHE)], ["memory"]):
                self._keep(name, partial(mixed_load, self._effort, servers[OURS]))
        if "cache" in self._names:
            self._keep("cache", partial(cache_hits, self._effort, self._logs))
        if "gpu" in self._names:
            self._keep("gpu", partial(gpu, self._effort, self._logs))

    def _with_servers(
        self, specs: Sequence[ServerSpec], names: Sequence[str]
    ) -> Iterator[tuple[str, Mapping[str, Running]]]:
        print(f"Starting {', '.join(spec.name for spec in specs)}", flush=True)
        try:
            with running(specs, self._logs) as servers:
                self._state_model(servers[OURS])
                for name in names:
                    yield name, servers
        except ServerFailed as failure:
            self._fail(", ".join(names), failure)

    def _state_model(self, server: Running) -> None:
        server.resume()
        info = server.get("/info") or {}
        server.pause()
        told = {key: value for key, value in info.items() if isinstance(value, str | int | float)}
        fact = f"{OURS}: " + ", ".join(f"{key} {value}" for key, value in told.items())
        if fact not in self.facts:
            self.facts.append(fact)

    def _keep(self, name: str, measure: Callable[[], Row]) -> None:
        print(f"Measuring {name} …", flush=True)
        try:
            row = measure()
        except (LoadFailed, ServerFailed, OSError, HTTPException) as failure:
            self._fail(name, failure)
        else:
            self.rows.append(row)
            print(report.markdown(row), flush=True)

    def _fail(self, name: str, failure: Exception) -> None:
        self.failures.append(f"{name} was not measured: {failure}")
        print(self.failures[-1], flush=True)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedding", description=(__doc__ or "").strip())
    parser.add_argument("--quick", action="store_true", help="a few minutes, to see that all works; not for figures")
    choices = [*BESIDE_PEERS, *ALONE]
    parser.add_argument("--only", action="append", choices=choices, help="measure this row; may be given again")
    parser.add_argument("--out", type=Path, help="where RESULTS.md, the plot and the raw figures go")
    parser.add_argument("--note", default="", help="what changed since the last figures, for RESULTS.md")
    options = parser.parse_args(given)
    options.only = options.only or choices
    if options.out is None:  # Quick figures do not belong among the real ones.
        options.out = machine.ROOT / ("build/benchmarks" if options.quick else "benchmarks")
    return options


def main(given: Sequence[str]) -> int:
    """Measure, print, and add a section to RESULTS.md; return 1 when a row could not be measured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the servers are ended too.
    options = arguments(given)
    count_tokens = model_token_counter(str(model_directory()))
    for tokens in (SHORT_TOKENS, LONG_TOKENS):
        check_lengths(texts(200, tokens, seed=0), tokens, count_tokens)
    about = machine.describe()
    print("\n".join([machine.commit(), *about]), flush=True)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as logs:
        session = Session(QUICK if options.quick else FULL, options.only, Path(logs))
        session.run()
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    options.out.mkdir(parents=True, exist_ok=True)
    plot_name = f"plots/embedding-{stamp}.png"
    drawn = report.plot(session.rows, options.out / plot_name)
    text = report.section(
        session.rows,
        commit=machine.commit(),
        note=options.note,
        machine=[*about, *session.facts, *session.failures],
        command=shlex.join(["python", "-m", "benchmarks.embedding", *_without_note(given)]),
        plot=plot_name if drawn else None,
    )
    report.append(options.out / "RESULTS.md", text)
    print(f"Written to {options.out / 'RESULTS.md'}")
    return 1 if session.failures else 0


def _without_note(given: Sequence[str]) -> list[str]:
    return [word for before, word in zip(["", *given], given, strict=False) if "--note" not in (before, word)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
