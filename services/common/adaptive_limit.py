"""
How much work may be under way at once, found out from how long it takes: pure arithmetic, told the time by its caller.

The limit follows the gradient of latency (as in Netflix's concurrency-limits): while work takes not much longer than it
does unloaded, more is let in; when it takes several times as long, less. Two things are added. Work that takes a small
part of the time that its caller allows is not slow, however quick it is unloaded: to let in less of it would leave
cores idle that many processes share, and turn away what would be answered in time. And work that takes long while
little is done is not overload, it waits for something slow, and to let in less of it would only turn callers away.
Unless work runs out of time: then what it waits for has too much to do, and more of it would bury that.
"""

import math
from dataclasses import dataclass
from typing import Final

TOLERANCE: Final = (
    4.0  # Batches form and cores are shared long before work queues up: so many times the unloaded time is well.
)
WELL_SHARE: Final = 0.2  # So much of the time that the caller allows is well too …
WELL_S: Final = 0.25  # … up to so long, as those who wait outside may be more urgent.
WINDOW_S: Final = 0.1
LONGEST_WINDOW_S: Final = 0.5
MIN_SAMPLES: Final = 10
SMOOTH_S: Final = 1.0  # The rate of work done is seen over about so long.
PEAK_HALF_LIFE_S: Final = 10.0  # … and the best of it is remembered so long.
FORGET_S: Final = 10.0  # A limit that nobody feels returns in about so long to where it began.
BUSY_SHARE: Final = 0.7  # Under this share of the best rate, what is slow is not our own load.
LARGEST_CUT: Final = 0.8
STALLED_GROWTH: Final = 1.5
STALLED_AFTER: Final = 4.0  # So many ends were due, and none came.
MOST_IN_VAIN: Final = 0.05  # Share of the work that may run out of time while what it waits for is merely slow.
HELD_S: Final = 10.0  # After more than that did, what is slow is not believed to be idle for so long.
RELEARNT: Final = 0.1  # Of a time seen without load, into the unloaded time; under load it only rises very slowly.
RISE_PER_S: Final = 1.002


@dataclass(frozen=True, slots=True)
class Load:
    """
    How things are at one moment.

    *used_up*: as much is under way as the limit allows, or nearly; otherwise what happens says nothing about the limit.
    *wanted*: more waits, without which there is nothing to cut. *idle*: hardly anything is under way, so that what ends
    took no longer than it must. *keeps_up*: this process has time to spare, so that slow work waits for something else.
    """

    used_up: bool
    wanted: bool
    idle: bool
    keeps_up: bool


class _Kind:
    """What is known of work of about one cost: its unloaded time, and its usual one now."""

    __slots__ = ("least_s", "unloaded_s", "usual_s")

    def __init__(self, seconds: float) -> None:
        self.unloaded_s = seconds
        self.usual_s = seconds
        self.least_s = math.inf  # … since the last look.

    def well_s(self, allowed_s: float) -> float:
        """Return how long such work may take until it is slow, its caller allowing *allowed_s*."""
        return max(TOLERANCE * self.unloaded_s, min(WELL_SHARE * allowed_s, WELL_S), 1e-6)

    def learn(self, elapsed_s: float, *, loaded: bool) -> None:
        """Let the unloaded time follow what was seen since the last look."""
        if loaded:
            self.unloaded_s *= RISE_PER_S**elapsed_s
        elif self.least_s < math.inf:
            self.unloaded_s += RELEARNT * max(0.0, self.least_s - self.unloaded_s)
        self.least_s = math.inf


class AdaptiveLimit:
    """
    The limit, between *floor* and *ceiling*, in units of cost.

    Latency is compared with the least that work of about the same cost (within a factor of two) took.
    """

    def __init__(self, *, floor: float, ceiling: float, start: float, now: float) -> None:
        if not 0 < floor <= ceiling:
            raise ValueError(f"floor {floor} and ceiling {ceiling}: 0 < floor <= ceiling")
        self.limit = min(max(start, floor), ceiling)
        self._start = self.limit
        self._floor = floor
        self._ceiling = ceiling
        self._kinds: dict[int, _Kind] = {}
        self._usual_s = 0.0
        self._rate = 0.0
        self._peak = 0.0
        self._ends_per_s = 0.0
        self._used_up = self._wanted = False
        self._idle = True
        self._buried_at = -math.inf
        self._begin(now)

    def usual_s(self, cost: float) -> float:
        """Return how long work of *cost* takes now; 0 until any was measured."""
        kind = self._kinds.get(_kind(cost))
        return kind.usual_s if kind is not None else self._usual_s

    def expected_wait_s(self, ahead: float) -> float:
        """Return how long work waits that has *ahead* of it in units of cost, the limit being used up (Little's law)."""
        return ahead * self._usual_s / self.limit

    def ended(self, cost: float, seconds: float, allowed_s: float) -> None:
        """Take note that work of *cost*, which had *allowed_s*, was done *seconds* after it had been let in."""
        kind = self._kinds.get(_kind(cost))
        if kind is None:
            kind = self._kinds[_kind(cost)] = _Kind(seconds)
        kind.least_s = min(kind.least_s, seconds)
        kind.unloaded_s = min(kind.unloaded_s, seconds)
        kind.usual_s += 0.1 * (seconds - kind.usual_s)
        self._usual_s += (0.1 if self._usual_s else 1.0) * (seconds - self._usual_s)
        self._done += cost
        self._judged += cost
        self._samples += 1
        self._slowness += cost * seconds / kind.well_s(allowed_s)

    def failed(self, cost: float, seconds: float, allowed_s: float) -> None:
        """Take note that work of *cost* had no result after *seconds*: with one it would have taken no less."""
        kind = self._kinds.get(_kind(cost))
        if kind is not None and seconds > kind.usual_s:
            well_s = kind.well_s(allowed_s)
            self._judged += cost
            self._slowness += cost * seconds / well_s
            self._in_vain += cost if seconds > well_s else 0.0  # Otherwise it was in haste.

    def look(self, now: float, load: Load) -> None:
        """
        Let the limit follow what happened since the last look, if there is enough of it, *load* being how things are now.
        """
        elapsed_s = now - self._since
        self._used_up = self._used_up or load.used_up
        self._wanted = self._wanted or load.wanted
        self._idle = self._idle and load.idle
        stalled = self._stalled(elapsed_s)
        too_few = self._samples < MIN_SAMPLES and elapsed_s < LONGEST_WINDOW_S
        if elapsed_s < WINDOW_S or (too_few and not stalled):
            return
        weight = 1.0 - math.exp(-elapsed_s / SMOOTH_S)
        self._rate += weight * (self._done / elapsed_s - self._rate)
        self._ends_per_s += weight * (self._samples / elapsed_s - self._ends_per_s)
        self._peak = max(self._rate, self._peak * 0.5 ** (elapsed_s / PEAK_HALF_LIFE_S))
        buried = self._in_vain > MOST_IN_VAIN * (self._done + self._in_vain)
        if buried:
            self._buried_at = now
        if self._used_up or buried:
            slow_elsewhere = load.keeps_up and (stalled or self._rate < BUSY_SHARE * self._peak)
            growth = 1.0 if now - self._buried_at < HELD_S else STALLED_GROWTH
            self._follow(slow_elsewhere=slow_elsewhere, growth=growth, buried=buried)
        elif self.limit < self._start:
            self.limit += (self._start - self.limit) * (1.0 - math.exp(-elapsed_s / FORGET_S))
        for kind in self._kinds.values():
            kind.learn(elapsed_s, loaded=not self._idle)
        self._begin(now)

    def _follow(self, *, slow_elsewhere: bool, growth: float, buried: bool) -> None:
        slowness = self._slowness / self._judged if self._judged else math.inf
        if slowness <= 1.0:
            wanted = self.limit + max(1.0, 0.5 * math.sqrt(self.limit))
        elif slow_elsewhere and not buried:
            wanted = self.limit * growth
        elif self._judged and (self._wanted or buried):
            wanted = self.limit * max(LARGEST_CUT, math.sqrt(1.0 / slowness))
        else:
            wanted = self.limit
        self.limit = min(max(wanted, self._floor), self._ceiling)

    def _stalled(self, elapsed_s: float) -> bool:
        return self._samples == 0 and elapsed_s >= WINDOW_S and elapsed_s * self._ends_per_s >= STALLED_AFTER

    def _begin(self, now: float) -> None:
        self._since = now
        self._done = self._judged = self._in_vain = 0.0
        self._samples = 0
        self._slowness = 0.0
        self._used_up = self._wanted = False
        self._idle = True


def _kind(cost: float) -> int:
    return round(math.log2(max(cost, 1e-3)))
