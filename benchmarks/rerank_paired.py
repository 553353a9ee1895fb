"""Whether one ranking is better than another on the same queries: a paired randomisation test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 10_000
_SEED = 29
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean difference, how many queries were better, equal and worse, and how often chance alone gives as much."""

    difference: float
    better: int
    equal: int
    worse: int
    p: float


def compare(groups: Sequence[tuple[Sequence[float], Sequence[float]]], *, rounds: int = ROUNDS) -> Comparison:
    """
    Compare two systems by their values for the same queries: *groups* has (one's, the other's) for each set.

    The difference is the mean of the sets' mean differences. The test is two-sided: were both systems alike, the sign of
    each query's difference would be chance, so *p* is the share of *rounds* random choices of all signs (and the one that
    was found) whose difference is at least as large (Smucker, Allan and Carterette, CIKM 2007). The seed is fixed.
    """
    differences = [np.subtract(ours, theirs) for ours, theirs in groups]
    found = float(np.mean([values.mean() for values in differences]))
    draw = np.random.default_rng(_SEED)
    by_chance = np.zeros(rounds)
    for values in differences:
        signs = draw.integers(0, 2, size=(rounds, len(values)), dtype=np.int8) * 2 - 1
        by_chance += signs @ values / len(values) / len(differences)
    as_large = int(np.count_nonzero(np.abs(by_chance) >= abs(found) - _EQUAL))
    together = np.concatenate(differences)
    better, worse = int(np.count_nonzero(together > _EQUAL)), int(np.count_nonzero(together < -_EQUAL))
    return Comparison(found, better, len(together) - better - worse, worse, (1 + as_large) / (1 + rounds))
