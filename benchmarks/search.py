"""`python -m benchmarks.search`: the search service's figures, beside vector databases, in one run (see RESULTS.md)."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.effort import FULL, QUICK
from benchmarks.loading import bulk_load, searches_while_loading
from benchmarks.report import Row
from benchmarks.retrieval import beside_databases, fallback, growth
from benchmarks.session import Session, arguments, measure
from benchmarks.sharding import one_shard_against_eight
from benchmarks.vectors import VectorSet, make

ROWS = ("latency", "load", "loading", "growth", "fallback", "sharding")
QUERIES = 500
QUERIES_PER_ROUND = 100  # The slowest peer takes a quarter of a second for each.


class SearchSession(Session):
    """Measures the rows asked for."""

    def __init__(self, *, quick: bool, names: Sequence[str], scratch: Path) -> None:
        super().__init__()
        self._effort = QUICK if quick else FULL
        self._rows = 10_000 if quick else 100_000
        self._sizes = (2_000, 10_000) if quick else (10_000, 100_000, 1_000_000)
        self._names = names
        self._scratch = scratch

    def run(self) -> None:
        """Measure; each row is printed when it is done."""
        most = max(self._sizes) if "growth" in self._names else self._rows
        vectors = make(self._scratch, max(most, self._rows), queries=QUERIES)
        for name in ROWS:
            if name in self._names:
                self.keep(name, partial(self._measure, name, vectors))

    def _measure(self, name: str, vectors: VectorSet) -> Row:
        match name:
            case "latency":
                return beside_databases(self._effort, vectors, self._rows, QUERIES_PER_ROUND, self._scratch)
            case "load":
                return bulk_load(self._effort, vectors, self._rows, self._scratch)
            case "loading":
                return searches_while_loading(vectors, self._rows, self._scratch)
            case "growth":
                return growth(vectors, self._sizes, QUERIES, self._scratch)
            case "fallback":
                return fallback(vectors, self._rows, QUERIES, self._scratch)
        return one_shard_against_eight(self._scratch)


def main(given: Sequence[str]) -> int:
    """Measure, print, and add a section to RESULTS.md; return 1 when a row could not be measured."""
    options = arguments("search", (__doc__ or "").strip(), ROWS, given)
    return measure(
        "search",
        options,
        given,
        lambda scratch: SearchSession(quick=options.quick, names=options.only, scratch=scratch),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
