"""A quantile of the latest samples of something, cheap enough for every call."""

from collections import deque


class RollingQuantile:
    """
    The *quantile* (0 to 1) of the last *window* samples. It is looked up anew after every *refresh* samples.

    `value` is None until there are *least* samples: fewer say nothing about a tail.
    """

    def __init__(self, quantile: float = 0.95, *, window: int = 128, refresh: int = 16, least: int = 16) -> None:
        self._quantile = quantile
        self._samples: deque[float] = deque(maxlen=window)
        self._refresh = refresh
        self._least = least
        self._until_refresh = least
        self.value: float | None = None

    def note(self, sample: float) -> None:
        """Take a sample."""
        self._samples.append(sample)
        self._until_refresh -= 1
        if self._until_refresh <= 0:
            self._until_refresh = self._refresh
            ordered = sorted(self._samples)
            self.value = ordered[min(len(ordered) - 1, int(self._quantile * len(ordered)))]
