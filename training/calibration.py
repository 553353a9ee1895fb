"""Platt's scaling: what turns scores into the probability that a candidate answers (Platt, 1999)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_STEPS = 100
_ENOUGH = 1e-10
# Keeps the fit finite where the scores divide the labels perfectly.
_RIDGE = 1e-6


def fit_sigmoid(scores: Doubles, labels: Doubles, weights: Doubles) -> list[float]:
    """
    Return the factors of the columns of *scores*, shape [n, k], and last the constant, of the likeliest sigmoid.

    *labels* are 0 or 1, *weights* say how much each row counts. Newton's method on the logistic loss.
    """
    deviations = np.maximum(scores.std(axis=0), 1e-9)
    columns = np.column_stack([scores / deviations, np.ones(len(scores))])
    share = weights / weights.sum()
    factors = np.zeros(columns.shape[1])
    for _ in range(_STEPS):
        probabilities = sigmoid(columns @ factors)
        gradient = columns.T @ (share * (probabilities - labels)) + _RIDGE * factors
        curvature = (columns * (share * probabilities * (1 - probabilities))[:, None]).T @ columns
        change = np.linalg.solve(curvature + _RIDGE * np.eye(len(factors)), gradient)
        change *= min(1.0, 5.0 / max(1e-9, float(np.abs(change).max())))
        factors -= change
        if float(np.abs(change).max()) < _ENOUGH:
            break
    return [*(factors[:-1] / deviations).tolist(), float(factors[-1])]


def sigmoid(values: Doubles) -> Doubles:
    """Return 1 / (1 + exp(-values)), without overflow."""
    made: Doubles = 0.5 * (1.0 + np.tanh(0.5 * values))
    return made


def brier(probabilities: Sequence[float], labels: Sequence[float]) -> float:
    """Return the mean squared distance of *probabilities* from *labels* (Brier, 1950): 0 is perfect."""
    return float(np.mean((np.asarray(probabilities) - np.asarray(labels)) ** 2))
