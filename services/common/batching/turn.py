"""Whose turn it is on a device that several models share."""

import threading
from collections import deque

from services.common.errors import NotReady


class DeviceTurn:
    """
    A lock that is given in the order it was asked for: one batch at a time on the device, whichever model's.

    `threading.Lock` promises no order, and a busy model would take it again before another wakes up.
    Threads may acquire and release it in turn; it is not reentrant.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False
        self._failure: str | None = None

    def acquire(self) -> None:
        """
        Wait for the turn.

        Raises:
            NotReady: The device was given up, now or while waiting.
        """
        with self._lock:
            if self._failure is None and not self._held:
                self._held = True
                return
            gate = threading.Lock()
            gate.acquire()
            if self._failure is None:
                self._waiting.append(gate)
            else:
                gate.release()
        gate.acquire()
        if self._failure is not None:
            raise NotReady(self._failure)

    def release(self) -> None:
        """Pass the turn on to whoever has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def give_up(self, reason: str) -> None:
        """Refuse the device to everybody from now on: whoever holds it hangs, so nobody else would get it."""
        with self._lock:
            self._failure = self._failure or reason
            while self._waiting:
                self._waiting.popleft().release()
