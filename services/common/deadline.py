"""Deadlines: the moment after which nobody is waiting, carried between services as remaining milliseconds."""

import math
import time
from dataclasses import dataclass

from services.common.errors import DeadlineExceeded, Malformed

HEADER = "x-deadline-ms"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on this process's monotonic clock; `at` is infinite when the caller waits for ever."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Return the deadline *seconds* from now."""
        return cls(time.monotonic() + seconds)

    @classmethod
    def from_header(cls, value: str, *, cap_s: float) -> "Deadline":
        """
        Read `X-Deadline-Ms`: the caller's remaining milliseconds, capped at *cap_s* seconds.

        Raises:
            Malformed: The value is not a positive number.
        """
        try:
            remaining_ms = float(value)
        except ValueError:
            remaining_ms = math.nan
        if not remaining_ms > 0:
            raise Malformed(
                f"X-Deadline-Ms must be a positive number of milliseconds, not {value[:40]!r}", param=HEADER
            )
        return cls.after(min(remaining_ms / 1000, cap_s))

    def to_header(self) -> str:
        """Return the remaining whole milliseconds, at least 1."""
        return str(max(1, int(self.remaining_s() * 1000)))

    def remaining_s(self) -> float:
        """Return the seconds left, negative once it has passed, infinite when there is none."""
        return self.at - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether nobody is waiting any more."""
        return self.remaining_s() <= 0

    def earlier(self, seconds: float) -> "Deadline":
        """Return a deadline *seconds* before this one: time kept back for the steps after."""
        return Deadline(self.at - seconds)

    def at_most(self, seconds: float) -> "Deadline":
        """Return this deadline or the one *seconds* from now, whichever comes first."""
        return Deadline(min(self.at, time.monotonic() + seconds))

    def check(self, what: str) -> None:
        """
        Do nothing while there is time left.

        Raises:
            DeadlineExceeded: It has passed; *what* names the stage that found out.
        """
        if self.passed:
            raise DeadlineExceeded(f"The time allowed for this request ran out in {what}")


NO_DEADLINE = Deadline()
