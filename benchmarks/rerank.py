"""`python -m benchmarks.rerank`: the rerank service's figures, beside its peers, in one run (see RESULTS.md)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import rerank_model
from benchmarks.effort import FULL, QUICK, Effort
from benchmarks.report import Row
from benchmarks.rerank_crowd import crowd
from benchmarks.rerank_rows import idle, max_sim
from benchmarks.rerank_servers import (
    DOCUMENT_WORDS,
    MAX_SIM,
    QUERY_WORDS,
    SHIPPED,
    has_shipped_model,
    infinity_rerank,
    rerank,
)
from benchmarks.servers import OURS, Running, ServerFailed, ServerSpec, model_directory, running
from benchmarks.session import Session, arguments, measure
from benchmarks.texts import MARKERS, check_lengths, model_token_counter, texts

ROWS = ("idle", "crowd", "maxsim")


class RerankSession(Session):
    """Measures the rows asked for."""

    def __init__(self, effort: Effort, names: Sequence[str], scratch: Path) -> None:
        super().__init__()
        self._effort = effort
        self._names = names
        self._scratch = scratch

    def run(self) -> None:
        """Measure; each row is printed when it is done."""
        model = rerank_model.make(self._scratch / "cross-encoder")
        self.facts.append(
            "cross-encoder: 6 layers of 384, all-MiniLM-L6-v2's weights with a head made here, the same directory for all"
        )
        one = [rerank(model=model)]
        if "idle" in self._names:
            shipped = [rerank(SHIPPED)] if has_shipped_model() else []
            peer = infinity_rerank(model)
            specs = [*one, *shipped, *([peer] if peer else [])]
            self._with_servers("idle", specs, lambda servers: idle(self._effort, servers, model))
        if "crowd" in self._names:
            self._with_servers("crowd", one, lambda servers: crowd(self._effort, servers[OURS], model))
        if "maxsim" in self._names:
            late = [rerank(model=MAX_SIM)]
            self._with_servers("maxsim", late, lambda servers: max_sim(self._effort, servers[OURS]))

    def _with_servers(
        self, name: str, specs: Sequence[ServerSpec], measured: Callable[[Mapping[str, Running]], Row]
    ) -> None:
        """Measure the row *name* with *specs* running, paused at first."""
        print(f"Starting {', '.join(spec.name for spec in specs)}", flush=True)
        try:
            with running(specs, self._scratch) as servers:
                for server in servers.values():
                    if server.spec.name in (OURS, SHIPPED):
                        self._state_model(name, server)
                self.keep(name, partial(measured, servers))
        except ServerFailed as failure:
            self.fail(name, failure)

    def _state_model(self, row: str, server: Running) -> None:
        server.resume()
        info = server.get("/info") or {}
        server.pause()
        told = [f"{key} {value}" for key, value in info.items() if isinstance(value, str | int | float)]
        self.facts.append(f"{server.spec.name} ({row}): {', '.join(told)}")


def main(given: Sequence[str]) -> int:
    """Measure, print, and add a section to RESULTS.md; return 1 when a row could not be measured."""
    options = arguments("rerank", (__doc__ or "").strip(), ROWS, given)
    count_tokens = model_token_counter(str(model_directory()))
    for words in (QUERY_WORDS, DOCUMENT_WORDS):
        check_lengths(texts(200, words + MARKERS, seed=0), words + MARKERS, count_tokens)
    effort = QUICK if options.quick else FULL
    return measure("rerank", options, given, lambda scratch: RerankSession(effort, options.only, scratch))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
