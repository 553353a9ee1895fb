"""
How long a batch takes: a model of this model on this machine, measured at warm-up and kept up to date by what batches take.

    seconds = c0 + c1 × padded tokens + c2 × padded tokens × longest        c ≥ 0, padded tokens = items × longest

c0 is what any batch costs, c1 the work that is linear in tokens (projections, feed-forward), c2 attention.
The coefficients minimise the squared relative error by non-negative least squares; with three of them every active set
is tried (C. L. Lawson and R. J. Hanson, "Solving Least Squares Problems", 1974, ch. 23, gives the conditions).

They say how batches of different sizes compare, which changes little and takes many batches to find out. How fast the
machine is just now, which others may be using too, is one factor over them: the pace, known after a few batches.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import exp, log
from statistics import median

import numpy as np
from numpy.typing import NDArray

Sample = tuple[int, int, float]  # items, longest tokens, seconds
Coefficients = tuple[float, float, float]

FORGET = 0.98  # What a sample counts for after the next one: about the last 50 batches matter.
PRIOR_WEIGHT = (
    4.0  # Samples that the measurement at warm-up counts for, for ever: batches of one size say nothing of others.
)
REFIT_EVERY = 4
READY_AFTER = 20  # Batches, where nothing was measured at warm-up.
SURPRISE = (
    4.0  # A batch is counted as at most this much slower or faster than predicted: the machine was busy elsewhere.
)
# Of the difference, as a logarithm, the pace makes up this much with each batch: one that is four times slower is
# predicted within 1.5 times after four batches, and a stall that hits one batch adds half to what is predicted next.
QUICKNESS = 0.3
RECENT = 12  # Batches that the pace is found from; those before hardly count.
SMALLEST_SECONDS = 1e-6
BATCH_OVERHEAD_S = 0.0003  # Taking a batch and handing its results out, which the model's own time does not contain.
NEAR_BEST = 0.98
LEAST_BUDGET_SHARE = 0.25  # Of the most; c0 is the difference of larger numbers, and a noisy machine may hide it.

MOST_APART = 8  # Times the size of the smaller of two batches that show how throughput still grows.

_SCALE = np.array([1.0, 1e3, 1e5])
_SUBSETS = [list(subset) for size in (3, 2, 1) for subset in combinations(range(3), size)]
_DEFAULT = (0.001, 1 / 4_000, 0.0)
_DEFAULT_SAMPLES = [
    (items, tokens, _DEFAULT[0] + items * tokens * _DEFAULT[1]) for items in (1, 8, 32) for tokens in (8, 64, 256)
]


class CostModel:
    """Predicts a batch's time. One thread observes; any may predict."""

    def __init__(self) -> None:
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
        self._level = 1.0  # How much slower than the prior says batches are, the pace apart.
        self._pace = 1.0  # How much slower than the coefficients say batches are just now.
        self._recent: deque[Sample] = deque(maxlen=RECENT)
        self._prior = _DEFAULT
        self._prior_gram, self._prior_moment = _normal_equations(_DEFAULT_SAMPLES)
        self._coefficients = _DEFAULT
        self._observed = 0
        self._calibrated = False
        self._overhead_tokens = 0.0

    @property
    def ready(self) -> bool:
        """Whether predictions rest on measurements."""
        return self._calibrated or self._observed >= READY_AFTER

    def predict_s(self, items: int, longest_tokens: int) -> float:
        """Return the seconds that a batch of *items*, padded to *longest_tokens*, is expected to take."""
        return self._pace * _seconds(self._coefficients, items, longest_tokens)

    def work_s(self, items: int, tokens: int, square_tokens: int, batch_tokens: int) -> float:
        """
        Return the seconds that *items* are expected to take in batches of *batch_tokens*, padding left out.

        *tokens* and *square_tokens* are the sums of their lengths and of their lengths' squares.
        """
        constant, linear, attention = self._coefficients
        batches = -(-tokens // max(1, batch_tokens)) if items else 0
        return self._pace * (constant * batches + linear * tokens + attention * square_tokens)

    def budget_tokens(self, most: int) -> int:
        """
        Return the fewest padded tokens, a quarter of *most* to *most*, whose throughput is within 2 % of that of *most*.

        With t(n) = c0 + c1 n, throughput n / t(n) is a share n c1 / t(n) of its limit, which is solved for n.
        Shorter batches for the same throughput are shorter waits. Attention is left out: it only makes fewer suffice.
        Matrix products grow more efficient with their size long after c0 is paid, so c0 is at least what the largest batches
        of the measurement at warm-up say.
        """
        if not self.ready:
            return most
        constant, linear, _ = self._coefficients
        if linear <= 0:
            return most
        overhead_tokens = max(constant / linear, self._overhead_tokens) + BATCH_OVERHEAD_S / self._pace / linear
        share = NEAR_BEST * most / (most + overhead_tokens)
        return min(most, max(round(LEAST_BUDGET_SHARE * most), round(overhead_tokens * share / (1 - share))))

    def calibrate(self, samples: Iterable[Sample]) -> None:
        """Start again from *samples*: at least one batch that was measured on the idle machine."""
        samples = list(samples)
        self._overhead_tokens = _overhead_tokens(samples)
        self._prior_gram, self._prior_moment = _normal_equations(samples)
        self._prior = self._coefficients = _non_negative(self._prior_gram, self._prior_moment)
        self._gram, self._moment = np.zeros((3, 3)), np.zeros(3)
        self._level = self._pace = 1.0
        self._recent.clear()
        self._calibrated = True

    def observe(self, items: int, longest_tokens: int, seconds: float) -> None:
        """Learn that a batch took *seconds*."""
        seconds = scale = max(seconds, SMALLEST_SECONDS)
        if self.ready:
            predicted = max(self.predict_s(items, longest_tokens), SMALLEST_SECONDS)
            seconds = min(max(seconds, predicted / SURPRISE), predicted * SURPRISE)
            self._recent.append((items, longest_tokens, seconds))
            self._pace = self._found_pace(self._coefficients)
            # Errors relative to the prediction: relative to what was measured, slow batches would count for too little.
            seconds /= self._pace
            scale = max(_seconds(self._coefficients, items, longest_tokens), SMALLEST_SECONDS)
        gram, moment = _normal_equations([(items, longest_tokens, seconds)], scale)
        self._gram = FORGET * self._gram + gram
        self._moment = FORGET * self._moment + moment
        prior = max(_seconds(self._prior, items, longest_tokens), SMALLEST_SECONDS)
        self._observed += 1
        self._level += max(0.1, 1 / self._observed) * (seconds / prior - self._level)
        if self._observed % REFIT_EVERY == 0 or not self.ready:
            # The prior at today's level: its weights are relative errors, so they shrink with the square of the level.
            weight = PRIOR_WEIGHT / self._level**2
            found = _non_negative(
                self._gram + weight * self._prior_gram, self._moment + weight * self._level * self._prior_moment
            )
            self._coefficients, self._pace = found, self._found_pace(found)

    def _found_pace(self, coefficients: Coefficients) -> float:
        """
        Return how much longer the latest batches took than *coefficients* say: the mean, on a scale of logarithms.

        A batch counts by its age and by its length: what a short one takes is mostly not the model's work.
        """
        if not self._recent:
            return 1.0
        total = weights = lengths = 0.0
        newness = 1.0
        for items, longest, seconds in reversed(self._recent):
            expected = max(_seconds(coefficients, items, longest), SMALLEST_SECONDS)
            total += QUICKNESS * newness * expected * log(seconds / expected)
            weights += QUICKNESS * newness * expected
            lengths += expected
            newness *= 1 - QUICKNESS
        return exp(total / (weights + newness * lengths / len(self._recent)))

    def as_dict(self) -> dict[str, float | bool]:
        """Return the coefficients in milliseconds, for people."""
        constant, linear, attention = (self._pace * coefficient for coefficient in self._coefficients)
        return {
            "ready": self.ready,
            "batch_ms": round(constant * 1e3, 3),
            "ms_per_1000_tokens": round(linear * 1e6, 3),
            "attention_ms_per_1000_tokens_of_length_100": round(attention * 1e8, 3),
            "batches": self._observed,
        }


def _seconds(coefficients: Coefficients, items: int, longest_tokens: int) -> float:
    constant, linear, attention = coefficients
    return constant + items * longest_tokens * (linear + attention * longest_tokens)


def _overhead_tokens(samples: Sequence[Sample]) -> float:
    """
    Return as how many tokens more a batch costs than its own, by the largest batches: the median over lengths.

    Of each length it is where the line through the two largest batches meets the axis; 0 where there are no two.
    """
    by_length: dict[int, list[tuple[int, float]]] = {}
    for items, longest, seconds in samples:
        if items > 1:
            by_length.setdefault(longest, []).append((items * longest, seconds))
    found = []
    for batches in by_length.values():
        (*_, (fewer, fewer_s), (more, more_s)) = [(0, 0.0), *sorted(batches)]
        if fewer < more <= MOST_APART * fewer and more_s > fewer_s:
            found.append((fewer_s * more - more_s * fewer) / (more_s - fewer_s))
    return max(0.0, median(found)) if found else 0.0


def _normal_equations(
    samples: list[Sample], scale_s: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return XᵀX and Xᵀy for the mean squared error relative to *scale_s*, else to each sample's own, in scaled features."""
    rows = np.array([(1.0, items * longest, items * longest * longest) for items, longest, _ in samples]) / _SCALE
    seconds = np.maximum([seconds for _, _, seconds in samples], SMALLEST_SECONDS)
    scale = seconds if scale_s is None else np.full(len(samples), scale_s)
    rows = rows / scale[:, None]
    return rows.T @ rows / len(samples), rows.T @ (seconds / scale) / len(samples)


def _non_negative(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> Coefficients:
    """Return the coefficients c ≥ 0, unscaled, that minimise cᵀ gram c − 2 momentᵀ c."""
    gram = gram + np.eye(3) * 1e-9 * max(float(np.trace(gram)), 1e-300)
    best, best_loss = np.zeros(3), 0.0
    for subset in _SUBSETS:
        solution = np.linalg.solve(gram[np.ix_(subset, subset)], moment[subset])
        loss = -float(moment[subset] @ solution)
        if loss < best_loss and (solution >= 0).all():
            best, best_loss = np.zeros(3), loss
            best[subset] = solution
    constant, linear, attention = best / _SCALE
    return float(constant), float(linear), float(attention)
