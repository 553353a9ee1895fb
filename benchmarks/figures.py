"""The arithmetic of the report: percentiles, medians with spread, ratios by round, slopes."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """What several rounds gave: their median, and the least and the most."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """Return the median of *values*, one a round, and their range."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Spread:
    """Return the spread of ours[i] / peer[i]: rounds are compared with themselves, for the machine's speed drifts."""
    return spread([mine / theirs for mine, theirs in zip(ours, peer, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the least value that *percent* % of *values* do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def slope_per_minute(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Return how much *values* grow per minute, by least squares."""
    return statistics.linear_regression(seconds, values).slope * 60


def number(value: float) -> str:
    """Return *value* with three digits that matter, thousands separated."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"
