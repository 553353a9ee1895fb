"""Shedding: which requests to turn away unread, so that those turned away do not take the time of those let in."""

import math
from typing import Final

from services.common.wire.search import Priority

DROWNING_LAG_S: Final = 0.025  # An event loop that comes to its next turn so late has no time to refuse with care.
BUSY_LAG_S: Final = 0.01  # One that has time to spare is not even so late.
LEAST_INSIDE: Final = 48.0  # So few requests never are too many.
SMOOTH_S: Final = 0.5
LAG_SMOOTH_S: Final = 0.2
USUAL_TIME_S: Final = 3.0
# A little less than what the queue behind lets in, so that most are refused here, where it costs least.
SHARE: Final[dict[Priority, float]] = {"low": 0.45, "normal": 0.9, "high": 1.8}


class Doorway:
    """Counts the requests that are inside, from before they are read until they are answered, and says who may come in."""

    def __init__(self) -> None:
        self.inside = 0
        self._ended = 0
        self._ends_per_s = 0.0
        self._lag_s = 0.0
        self._time_s = USUAL_TIME_S

    def lets_in(self, priority: Priority, *, wait_share: float, refusing: bool) -> bool:
        """
        Return whether to read the next request of *priority*, given the share of its time that it may spend waiting.

        Everything is read until requests are turned away later on (*refusing*), or the event loop does not keep up; then
        only while those inside will be done in that share of the time that callers allow (Little's law).
        """
        if not refusing and self._lag_s < DROWNING_LAG_S:
            return True
        return self.inside < SHARE[priority] * max(LEAST_INSIDE, self._ends_per_s * wait_share * self._time_s)

    @property
    def keeps_up(self) -> bool:
        """Whether the event loop comes to its turns in time."""
        return self._lag_s < BUSY_LAG_S

    def enter(self) -> None:
        """Count a request in."""
        self.inside += 1

    def leave(self) -> None:
        """Count it out: it was answered, or its caller is gone."""
        self.inside -= 1
        self._ended += 1

    def refused(self) -> None:
        """Take note that one of those inside was turned away after all: its end is no work done."""
        self._ended -= 1

    def note_time_allowed(self, seconds: float) -> None:
        """Take note of how long a caller will wait."""
        self._time_s += 0.05 * (seconds - self._time_s)

    def look(self, *, elapsed_s: float, lag_s: float) -> None:
        """Follow what happened in the last *elapsed_s*, at the end of which the event loop was *lag_s* late."""
        self._ends_per_s += (1.0 - math.exp(-elapsed_s / SMOOTH_S)) * (self._ended / elapsed_s - self._ends_per_s)
        self._lag_s += (1.0 - math.exp(-elapsed_s / LAG_SMOOTH_S)) * (lag_s - self._lag_s)
        self._ended = 0
