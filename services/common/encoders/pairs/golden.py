"""Pairs on which a runtime or precision is compared with fp32, and how near two sets of scores are."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.golden import GOLDEN_TEXTS

MIN_CORRELATION = 0.999
MAX_PROBABILITY_ERROR = 0.02
# Raw scores that differ by no more are equal, whatever correlation says of scores that hardly differ among themselves.
_EQUAL = 1e-3

_QUERIES = (
    "What do foxes do to dogs?",
    "Wie lange dauert die Lieferung nach Österreich?",
    "capital of Japan 東京",
)
SHORT_GOLDEN_PAIRS = (
    ("What do plants need?", "Plants need light, water and carbon dioxide."),
    ("What do plants need?", "The stock market fell sharply on Monday."),
    ("capital of Japan", "Tokyo is the capital of Japan."),
    ("one", "two"),
)
GOLDEN_PAIRS = (
    *SHORT_GOLDEN_PAIRS,
    *((query, text) for at, text in enumerate(GOLDEN_TEXTS) for query in (_QUERIES[at % 3], _QUERIES[(at + 1) % 3])),
)


class Closeness(NamedTuple):
    """The correlation of scores to those they should equal, and how far a probability is off at most."""

    correlation: float
    probability_error: float

    @property
    def passes(self) -> bool:
        """Whether both bounds hold."""
        return self.correlation >= MIN_CORRELATION and self.probability_error <= MAX_PROBABILITY_ERROR


def closeness(outputs: NDArray[np.float32], expected: NDArray[np.float32]) -> Closeness:
    """
    Compare a model's *outputs* with *expected*, both of shape [pairs, outputs]; what is not finite agrees in nothing.

    With two outputs it is their difference that correlates, as it ranks; with more all of them, each less its mean.
    """
    made, exact = outputs.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(made).all():
        return Closeness(0.0, 1.0)
    error = float(np.abs(probabilities(made) - probabilities(exact)).max())
    left, right = _ranking(made), _ranking(exact)
    if np.abs(left - right).max() <= _EQUAL:
        return Closeness(1.0, error)
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return Closeness(float(left @ right / lengths) if lengths else 0.0, error)


def probabilities(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sigmoid of a single output, the softmax of several; shape [pairs, outputs] as it came."""
    if outputs.shape[1] == 1:
        outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
        return probabilities(outputs)[:, 1:]
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    made: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return made


def _ranking(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    if outputs.shape[1] == 2:
        outputs = outputs[:, 1:] - outputs[:, :1]
    made: NDArray[np.float64] = (outputs - outputs.mean(axis=0)).ravel()
    return made
