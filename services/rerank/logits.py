"""Probabilities and their logits."""

import math

_ALMOST_NONE = 1e-12


def sigmoid(logit: float) -> float:
    """Return 1 / (1 + e^-logit), for any number."""
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


def logit_of(probability: float) -> float:
    """Return the inverse of `sigmoid`; what is next to 0 or 1 counts as a little further away."""
    within = min(max(probability, _ALMOST_NONE), 1.0 - _ALMOST_NONE)
    return math.log(within / (1.0 - within))
