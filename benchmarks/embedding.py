"""`python -m benchmarks.embedding`: the embedding service's figures, beside its peers, in one run (see RESULTS.md)."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.caching import cache_hits
from benchmarks.contention import mixed_load, queries_amid_bulk
from benchmarks.effort import FULL, QUICK, Effort
from benchmarks.gpu import gpu
from benchmarks.load import find_wrk
from benchmarks.report import Row
from benchmarks.servers import OURS, Running, ServerFailed, ServerSpec, model_directory, peers, running, tercet
from benchmarks.session import Session, arguments, measure
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


class EmbeddingSession(Session):
    """Measures the rows asked for."""

    def __init__(self, effort: Effort, names: Sequence[str], logs: Path) -> None:
        super().__init__()
        self._effort = effort
        self._names = names
        self._logs = logs
        self._wrk = find_wrk()

    def run(self) -> None:
        """Measure; each row is printed when it is done."""
        wanted = [name for name in BESIDE_PEERS if name in self._names]
        if wanted:
            specs = [tercet(**NO_CACHE), *peers()]
            for name, servers in self._with_servers(specs, wanted):
                self.keep(name, partial(BESIDE_PEERS[name], self._effort, servers, self._wrk))
        if "memory" in self._names:
            for name, servers in self._with_servers([tercet(**SMALL_CACHE)], ["memory"]):
                self.keep(name, partial(mixed_load, self._effort, servers[OURS]))
        if "cache" in self._names:
            self.keep("cache", partial(cache_hits, self._effort, self._logs))
        if "gpu" in self._names:
            self.keep("gpu", partial(gpu, self._effort, self._logs))

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
            self.fail(", ".join(names), failure)

    def _state_model(self, server: Running) -> None:
        server.resume()
        info = server.get("/info") or {}
        server.pause()
        told = {key: value for key, value in info.items() if isinstance(value, str | int | float)}
        fact = f"{OURS}: " + ", ".join(f"{key} {value}" for key, value in told.items())
        if fact not in self.facts:
            self.facts.append(fact)


def main(given: Sequence[str]) -> int:
    """Measure, print, and add a section to RESULTS.md; return 1 when a row could not be measured."""
    options = arguments("embedding", (__doc__ or "").strip(), [*BESIDE_PEERS, *ALONE], given)
    count_tokens = model_token_counter(str(model_directory()))
    for tokens in (SHORT_TOKENS, LONG_TOKENS):
        check_lengths(texts(200, tokens, seed=0), tokens, count_tokens)
    effort = QUICK if options.quick else FULL
    return measure("embedding", options, given, lambda logs: EmbeddingSession(effort, options.only, logs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
