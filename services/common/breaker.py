"""
Circuit breaker for calls to another process: pybreaker is the state machine, our rolling window drives it.

pybreaker alone counts consecutive failures and guards synchronous calls; a dependency that fails every second call, or
answers slowly, would never open it. Here the share of failed and slow calls in a time window decides.
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pybreaker
import structlog

from services.common.errors import DependencyUnavailable

log = structlog.get_logger(__name__)

STATES = {"closed": 0, "half-open": 1, "open": 2}


class NotAFailure(Exception):
    """Wraps an outcome that says nothing about the dependency's health: our caller's own bad input, say."""


class Breaker:
    """
    Guards one dependency. Used from one event loop.

    It opens when at least *min_calls* of the last *window_s* seconds' calls were made and *failure_ratio* of them
    failed or took over *slow_call_s*; after *reset_s* it lets one probe through at a time.
    """

    def __init__(
        self,
        name: str,
        *,
        window_s: float = 10.0,
        min_calls: int = 3,
        failure_ratio: float = 0.5,
        slow_call_s: float = float("inf"),
        reset_s: float = 2.0,
        on_state: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._window_s = window_s
        self._min_calls = min_calls
        self._failure_ratio = failure_ratio
        self._slow_call_s = slow_call_s
        self._reset_s = reset_s
        self._on_state = on_state or (lambda _state: None)
        self._clock = clock
        self._calls: deque[tuple[float, bool]] = deque()
        self._opened_at = 0.0
        self._probing = False
        # fail_max is never reached: the window decides, and moves the machine by open(), half_open() and close().
        self._machine = pybreaker.CircuitBreaker(fail_max=1 << 30, reset_timeout=0, name=name)
        self._on_state(STATES["closed"])

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        return str(self._machine.current_state)

    def would_refuse(self) -> bool:
        """Whether a call made now would be refused without being tried."""
        if self.state == "open":
            return self._clock() - self._opened_at < self._reset_s
        return self.state == "half-open" and self._probing

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """
        Let one call through, and learn from how it ends.

        `NotAFailure` raised inside counts neither way. A call that is cancelled counts neither way too, and gives back
        its permit if it was the probe.

        Raises:
            DependencyUnavailable: The breaker is open, or half-open with its probe under way.
        """
        if self.would_refuse():
            raise DependencyUnavailable(
                f"{self.name} is not answering; calls to it are paused", retry_after_s=self._reset_s
            )
        if self.state == "open":
            self._move("half-open")
        probe = self.state == "half-open"
        self._probing = self._probing or probe
        started = self._clock()
        failed: bool | None = None
        try:
            yield
            failed = self._clock() - started > self._slow_call_s
        except NotAFailure:
            raise
        except Exception:
            failed = True
            raise
        finally:
            if probe:
                self._probing = False
            if failed is not None:
                self._learn(failed, probe=probe)

    def _learn(self, failed: bool, *, probe: bool) -> None:
        now = self._clock()
        if probe:
            self._calls.clear()
            self._move("open" if failed else "closed")
            return
        self._calls.append((now, failed))
        while self._calls and self._calls[0][0] < now - self._window_s:
            self._calls.popleft()
        failures = sum(failed for _, failed in self._calls)
        enough = len(self._calls) >= self._min_calls and failures >= self._failure_ratio * len(self._calls)
        if failed and enough and self.state == "closed":
            self._move("open")

    def _move(self, state: str) -> None:
        if state == "open":
            self._opened_at = self._clock()
            self._machine.open()
        elif state == "half-open":
            self._machine.half_open()
        else:
            self._machine.close()
        self._on_state(STATES[state])
        log.warning("breaker_state", dependency=self.name, state=state)
