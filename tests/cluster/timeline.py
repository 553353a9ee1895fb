"""What happened when, on standard output; and how busy the machine was."""

import os
import time
from pathlib import Path


class Timeline:
    """Prints what it is told, with the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, what: str) -> None:
        """Print *what*."""
        print(f"{self.at(time.monotonic()):7.1f}  {what}", flush=True)

    def at(self, moment: float) -> float:
        """Return a moment of `time.monotonic` as seconds since the beginning."""
        return moment - self._began


class Meter:
    """How many of the machine's cores were busy since it was made, whoever used them."""

    def __init__(self) -> None:
        self._idle_s, self._at = _idle_s(), time.monotonic()

    def busy_cores(self) -> float:
        """Return the mean number."""
        return (os.cpu_count() or 1) - (_idle_s() - self._idle_s) / max(0.01, time.monotonic() - self._at)


def _idle_s() -> float:
    """Return for how long cores had nothing to do, all of them together, since the machine was started."""
    idle, waiting = Path("/proc/stat").read_text().split(maxsplit=6)[4:6]
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")
