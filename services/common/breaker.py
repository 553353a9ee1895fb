"""
Circuit breaker for calls to another process: pybreaker is the state machine, our rolling window drives it.

pybreaker alone counts consecutive failures and guards synchronous calls; a dependency that fails every second call, or
answers slowly, would never open it. Here the share of failed and slow calls in a time window decides.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pybreaker
import structlog

from services.common.errors import DependencyUnavailable

log = structlog.get_logger(__name__)

IN_A_ROW = 5  # Failures in a row that open a breaker, if that is not said.
STATES = {"closed": 0, "half-open": 1, "open": 2}


class NotAFailure(Exception):
    """Wraps an outcome that says nothing about the dependency's health: our caller's own bad input, say."""


class Unproven(NotAFailure):
    """No answer came, and none was due yet: no failure, but a probe that ends so has not shown that all is well."""


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    """
    How a breaker stands: its state, and how many calls of its window were made and failed (slow ones are failures).

    *opened_s_ago* is None while it is closed.
    """

    state: str
    opened_s_ago: float | None
    calls: int
    failures: int


@dataclass(slots=True)
class Permit:
    """One call that was let through; *excused_s* of its time were work that was asked for, and no slowness."""

    excused_s: float = 0.0


class Breaker:
    """
    Guards one dependency. Used from one event loop.

    It opens when at least *min_calls* of the last *window_s* seconds' calls were made and *failure_ratio* of them
    failed or were slow, or when the last *in_a_row* all did: a busy dependency that freezes would need seconds to
    reach the ratio. After *reset_s* it lets one probe through at a time. The first one comes *first_reset_s* after it
    opened, where that is given, and each one that fails doubles that, up to *reset_s*: for one that opens at a single
    failure, which may be nothing but a moment in which nobody had a processor.
    """

    def __init__(
        self,
        name: str,
        *,
        window_s: float = 10.0,
        min_calls: int = 3,
        failure_ratio: float = 0.5,
        reset_s: float = 2.0,
        first_reset_s: float | None = None,
        in_a_row: int | None = None,
        on_state: Callable[[int], None] | None = None,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._window_s = window_s
        self._min_calls = min_calls
        self._failure_ratio = failure_ratio
        self._reset_s = reset_s
        self._first_reset_s = reset_s if first_reset_s is None else min(first_reset_s, reset_s)
        self._pause_s = self._first_reset_s
        self._in_a_row = max(IN_A_ROW, min_calls) if in_a_row is None else in_a_row
        self._on_state = on_state or (lambda _state: None)
        self._on_failure = on_failure
        self._clock = clock
        self._calls: deque[tuple[float, bool]] = deque()
        self._failures = 0
        self._run = 0
        self._opened_at = 0.0
        self._opened_times = 0
        self._probing = False
        self._probe_over: asyncio.Event | None = None
        # fail_max is never reached: the window decides, and moves the machine by open(), half_open() and close().
        self._machine = pybreaker.CircuitBreaker(fail_max=1 << 30, reset_timeout=0, name=name)
        self._on_state(STATES["closed"])

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        return str(self._machine.current_state)

    @property
    def status(self) -> BreakerStatus:
        """How it stands now, for people."""
        now = self._clock()
        self._prune(now)
        ago = None if self.state == "closed" else now - self._opened_at
        return BreakerStatus(self.state, ago, len(self._calls), self._failures)

    def would_refuse(self) -> bool:
        """Whether a call made now would be refused without being tried."""
        if self.state == "open":
            return self._clock() - self._opened_at < self._pause_s
        return self.is_probing

    @property
    def is_probing(self) -> bool:
        """Whether one call is finding out now whether all is well again."""
        return self.state == "half-open" and self._probing

    async def probe_over(self) -> None:
        """Wait until no probe is under way; those who have nobody else to ask do better to wait than to give up."""
        while self.is_probing:
            self._probe_over = self._probe_over or asyncio.Event()
            await self._probe_over.wait()

    @asynccontextmanager
    async def guard(self, slow_s: float | None = None) -> AsyncIterator[Permit]:
        """
        Let one call through, and learn from how it ends; one that took over *slow_s* seconds counts as failed.

        `NotAFailure` raised inside counts neither way. A call that is cancelled counts neither way too, and gives back
        its permit if it was the probe. What a call finds that was let through before the breaker last opened is old
        news, and counts neither way.

        Raises:
            DependencyUnavailable: The breaker is open, or half-open with its probe under way.
        """
        probe = self.state != "closed"
        if probe:
            self._become_probe()
        opened_times = self._opened_times
        started = self._clock()
        failed: bool | None = None
        permit = Permit()
        try:
            yield permit
            failed = slow_s is not None and self._clock() - started - permit.excused_s > slow_s
        except NotAFailure as outcome:
            failed = True if probe and isinstance(outcome, Unproven) else None
            raise
        except Exception:
            failed = True
            raise
        finally:
            if probe:
                self._end_probe()
            if failed is not None and opened_times == self._opened_times:
                self._learn(failed, probe=probe)

    def _become_probe(self) -> None:
        if self.would_refuse():
            raise DependencyUnavailable(
                f"{self.name} is not answering; calls to it are paused", retry_after_s=self._pause_s
            )
        if self.state == "open":
            self._move("half-open")
        self._probing = True

    def _end_probe(self) -> None:
        self._probing = False
        if self._probe_over is not None:
            self._probe_over.set()
            self._probe_over = None

    def _learn(self, failed: bool, *, probe: bool) -> None:
        now = self._clock()
        if failed:
            self._on_failure()
        if probe:
            self._calls.clear()
            self._failures = self._run = 0
            self._pause_s = min(2 * self._pause_s, self._reset_s) if failed else self._first_reset_s
            self._move("open" if failed else "closed")
            return
        self._calls.append((now, failed))
        self._failures += failed
        self._run = self._run + 1 if failed else 0
        self._prune(now)
        calls, failures = len(self._calls), self._failures
        often = calls >= self._min_calls and failures >= self._failure_ratio * calls
        if failed and (often or min(self._run, failures) >= self._in_a_row):
            self._move("open")

    def _prune(self, now: float) -> None:
        calls = self._calls
        while calls and calls[0][0] < now - self._window_s:
            self._failures -= calls.popleft()[1]

    def _move(self, state: str) -> None:
        if state == "open":
            self._opened_at = self._clock()
            self._opened_times += 1
            self._machine.open()
        elif state == "half-open":
            self._machine.half_open()
        else:
            self._machine.close()
        self._on_state(STATES[state])
        log.warning("breaker_state", dependency=self.name, state=state, calls=len(self._calls), failures=self._failures)
