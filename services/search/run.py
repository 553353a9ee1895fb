"""One search under way: what was asked, how long it may take, and what was found out so far."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from services.common.deadline import Deadline
from services.common.tracing import span
from services.common.wire.search import AdmissionExplanation, CacheExplanation, Degradation, Mode, SearchRequest
from services.search.ladder import forbidden
from services.search.ports import Collection

Observe = Callable[[str, float], None]


@dataclass(slots=True)
class Run:
    """
    One search; *mode* is what really runs, *seq* the last operation that the ledger is known to have in *epoch*.

    *tenant* is whose search it is, where keys are on. *allowed_ms* has what each stage was allowed of *timeout_ms*, and
    *affordable* how many candidates there was time to rerank; *unread* are shards whose candidates could not be
    read. *cache* and *admission* are told to who wants it explained.
    """

    request: SearchRequest
    collection: Collection
    deadline: Deadline
    observe: Observe
    mode: Mode
    tenant: str = ""
    request_id: str | None = None
    started: float = field(default_factory=time.perf_counter)
    seq: int = 0
    epoch: str = ""
    degraded: list[Degradation] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    timeout_ms: float = 0.0
    allowed_ms: dict[str, float] = field(default_factory=dict)
    affordable: int | None = None
    reranked_by: str | None = None
    reranked: int = 0
    below_min_score: int = 0
    unread: frozenset[int] = frozenset()
    cache: CacheExplanation | None = None
    admission: AdmissionExplanation | None = None

    def degrade(self, reason: Degradation) -> None:
        """Note a step down, once. Raises as `check` does."""
        if reason not in self.degraded:
            self.check(reason)
            self.degraded.append(reason)

    def check(self, reason: Degradation) -> None:
        """
        Do nothing where the request allows the step down *reason*.

        Raises:
            DependencyUnavailable, DeadlineExceeded: It forbids it.
        """
        refused = forbidden(self.request.require, reason)
        if refused is not None:
            raise refused

    def patience(self, share: float) -> Deadline:
        """Return when something has to end that may use *share* of the time that is left."""
        return self.deadline.at_most(self.deadline.remaining_s() * share)

    def within(self, stage: str, allowed_s: float) -> Deadline:
        """Return when *stage* has to end, which may take *allowed_s*, and note that it may."""
        self.allowed_ms[stage] = round(allowed_s * 1000, 3)
        return self.deadline.at_most(allowed_s)

    def elapsed_ms(self) -> float:
        """Return the milliseconds since the search began."""
        return round((time.perf_counter() - self.started) * 1000, 3)

    def timed(self, stage: str) -> "Timed":
        """Return the context in which a stage runs: measured, and part of the request's trace."""
        return Timed(self, stage)


class Timed:
    """The time of one stage, which its run is told when it ends; *seconds* then has it."""

    __slots__ = ("_run", "_span", "_stage", "_started", "seconds")

    def __init__(self, run: Run, stage: str) -> None:
        self._run = run
        self._stage = stage
        self._span = span(f"search.{stage}")
        self._started = 0.0
        self.seconds = 0.0

    def __enter__(self) -> "Timed":
        self._started = time.perf_counter()
        self._span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._span.__exit__(kind, error, trace)
        self.seconds = time.perf_counter() - self._started
        self._run.timings_ms[self._stage] = round(self.seconds * 1000, 3)
        self._run.observe(self._stage, self.seconds)
