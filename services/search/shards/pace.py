"""A bounded share of one CPU for the work that nobody waits for: building and merging segments."""

import threading
import time

LONGEST_PAUSE_S = 1.0


class GivenUp(Exception):
    """The work is not wanted any more: the process is stopping."""


class Pace:
    """
    Call it often while working: it sleeps so that the thread computes for at most *share* of the time.

    Each thread has an account of its own. After `stop` every call raises GivenUp at once.
    """

    def __init__(self, share: float) -> None:
        """Allow *share* (above 0, up to 1) of a CPU."""
        self._pause_per_s = (1.0 - share) / share
        self._account = threading.local()
        self._stopped = threading.Event()

    def __call__(self) -> None:
        """Sleep as the share demands. Raises GivenUp once stopped."""
        used_s = time.thread_time()
        paid_s: float = getattr(self._account, "paid_s", used_s)
        pause_s = min(LONGEST_PAUSE_S, (used_s - paid_s) * self._pause_per_s)
        self._account.paid_s = used_s
        if pause_s > 0:
            self._stopped.wait(pause_s)
        if self._stopped.is_set():
            raise GivenUp("the shards are closing")

    def stop(self) -> None:
        """Let all work that keeps this pace end at its next step."""
        self._stopped.set()
