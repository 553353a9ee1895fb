"""One search under way: what was asked, how long it may take, and what was found out so far."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.common.deadline import Deadline
from services.common.tracing import span
from services.common.wire.search import Degradation, Mode, SearchRequest
from services.search.ports import Collection

Observe = Callable[[str, float], None]


@dataclass(slots=True)
class Run:
    """One search; *mode* is what really runs, *seq* the last operation that the ledger is known to have in *epoch*."""

    request: SearchRequest
    collection: Collection
    deadline: Deadline
    observe: Observe
    mode: Mode
    seq: int = 0
    epoch: str = ""
    degraded: list[Degradation] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    reranked_by: str | None = None
    reranked: int = 0
    below_min_score: int = 0

    def degrade(self, reason: Degradation) -> None:
        """Note a step down, once."""
        if reason not in self.degraded:
            self.degraded.append(reason)

    def patience(self, share: float) -> Deadline:
        """Return when a stage has to end that may use *share* of the time that is left."""
        return self.deadline.at_most(self.deadline.remaining_s() * share)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure a stage, as part of the request's trace."""
        started = time.perf_counter()
        try:
            with span(f"search.{stage}"):
                yield
        finally:
            seconds = time.perf_counter() - started
            self.timings_ms[stage] = round(seconds * 1000, 3)
            self.observe(stage, seconds)
