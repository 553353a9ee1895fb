"""Scores of different kinds on one scale: mean 0, deviation 1."""

from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

Values = TypeVar("Values", bound=NDArray[np.floating[Any]])

ALIKE: Final = 1e-9  # A deviation that is nothing but rounding.


def standardized(values: Values) -> Values:
    """Return *values* with mean 0 and deviation 1; zeros where they are all alike."""
    deviation = float(values.std()) if len(values) else 0.0
    made: Values = (values - values.mean()) / deviation if deviation > ALIKE else np.zeros_like(values)
    return made
