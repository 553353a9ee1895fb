"""How many calls beyond the first attempts may be made: retries and hedged reads alike, so that neither feeds an overload."""

import time
from collections.abc import Callable


class RetryBudget:
    """
    A token bucket that first attempts fill, one for a group of peers. Used from one event loop.

    Of the calls made over time at most *ratio* of the first attempts are extra ones, or *min_per_s* a second where
    there are few first attempts; *burst* is how many may come at once.
    """

    def __init__(
        self,
        ratio: float = 0.1,
        *,
        min_per_s: float = 1.0,
        burst: float = 10.0,
        on_take: Callable[[bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ratio = ratio
        self._min_per_s = min_per_s
        self._burst = burst
        self._on_take = on_take or (lambda _taken: None)
        self._clock = clock
        self._tokens = burst
        self._first_attempts = 0
        self._filled_at = clock()

    def first(self) -> None:
        """Note a first attempt. Call it once for each call, before it is made."""
        self._first_attempts += 1

    def take(self) -> bool:
        """Return whether one extra call may be made now, and count it as made if so. It never waits."""
        now = self._clock()
        earned = max(self._ratio * self._first_attempts, self._min_per_s * (now - self._filled_at))
        self._tokens = min(self._burst, self._tokens + earned)
        self._first_attempts, self._filled_at = 0, now
        taken = self._tokens >= 1.0
        if taken:
            self._tokens -= 1.0
        self._on_take(taken)
        return taken
