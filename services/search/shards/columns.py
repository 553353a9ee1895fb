"""Numbers by row: a column that selects the rows of an interval or of a set of values."""

import array
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

INT64 = np.iinfo(np.int64)

_FIRST_CAPACITY = 64
_SAMPLE = 512


class Column:
    """Numbers by row, rows ascending, in arrays that double when full. For one thread at a time."""

    def __init__(self, dtype: type[np.int64] | type[np.float64]) -> None:
        self._rows = np.empty(0, np.uint32)
        self._values: NDArray[Any] = np.empty(0, dtype)
        self._count = 0

    def append(self, row: int, value: int | float) -> None:
        """Add the value of *row*, which is beyond all rows so far."""
        if self._count == len(self._rows):
            capacity = max(_FIRST_CAPACITY, 2 * self._count)
            self._rows = np.resize(self._rows, capacity)
            self._values = np.resize(self._values, capacity)
        self._rows[self._count] = row
        self._values[self._count] = value
        self._count += 1

    def between(self, low: int | float, high: int | float, first_row: int = 0) -> BitMap:
        """Return the rows from *first_row* on with low ≤ value ≤ high."""
        if low > high:
            return BitMap()
        rows, values = self._since(first_row)
        return _bitmap(rows[(values >= low) & (values <= high)])

    def any_of(self, numbers: Sequence[int] | Sequence[float], first_row: int = 0) -> BitMap:
        """Return the rows from *first_row* on with one of *numbers*, which the column's type can hold exactly."""
        rows, values = self._since(first_row)
        if not len(rows) or not numbers:
            return BitMap()
        return _bitmap(rows[np.isin(values, np.array(numbers, self._values.dtype))])

    def estimate(self, low: int | float, high: int | float) -> float:
        """Return about how many values are from *low* to *high*, by a sample."""
        if not self._count or low > high:
            return 0.0
        sample = self._values[: self._count : max(1, self._count // _SAMPLE)]
        return float(((sample >= low) & (sample <= high)).mean() * self._count)

    def counts(self, rows: BitMap, limit: int) -> list[tuple[int | float, int]]:
        """Return the *limit* commonest values among *rows*, each with its count."""
        if not self._count or not rows:
            return []
        wanted = np.frombuffer(rows.to_array(), np.uint32)
        own = self._rows[: self._count]
        chosen = self._values[: self._count][np.isin(own, wanted, assume_unique=True)]
        values, counts = np.unique(chosen, return_counts=True)
        best = np.lexsort((values, -counts))[:limit]
        return list(zip(values[best].tolist(), counts[best].tolist(), strict=True))

    def freeze(self) -> list[bytes]:
        """Return what `load` makes the column of again."""
        return [self._rows[: self._count].astype("<u4").tobytes(), self._values[: self._count].tobytes()]

    @classmethod
    def load(cls, dtype: type[np.int64] | type[np.float64], frozen: Sequence[bytes]) -> "Column":
        """Return the column that `freeze` wrote. Raises ValueError for anything else."""
        made = cls(dtype)
        made._rows = np.frombuffer(frozen[0], "<u4").astype(np.uint32)
        made._values = np.frombuffer(frozen[1], dtype).copy()
        if len(made._rows) != len(made._values):
            raise ValueError(f"{len(made._rows)} rows and {len(made._values)} values")
        made._count = len(made._rows)
        return made

    def _since(self, first_row: int) -> tuple[NDArray[np.uint32], NDArray[Any]]:
        begin = int(np.searchsorted(self._rows[: self._count], first_row)) if first_row else 0
        return self._rows[begin : self._count], self._values[begin : self._count]


def _bitmap(rows: NDArray[np.uint32]) -> BitMap:
    # An array.array is what BitMap reads as a block; it would take a NumPy array number by number.
    return BitMap(array.array("I", rows.tobytes()))


def nearest(number: int | float) -> float:
    """Return the float nearest to *number*, infinite if it is out of range."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _integer_bounds(bound: int | float) -> tuple[int, int, int, int]:
    """Return the integers next to *bound*: least above, least not below, greatest below, greatest not above."""
    floor, ceil = math.floor(bound), math.ceil(bound)
    return floor + 1, ceil, ceil - 1, floor


def _float_bounds(bound: int | float) -> tuple[float, float, float, float]:
    """Return the floats next to *bound* (which may be an integer that no float equals), as `_integer_bounds` does."""
    near = nearest(bound)
    up = near if near >= bound else math.nextafter(near, math.inf)
    down = near if near <= bound else math.nextafter(near, -math.inf)
    above = up if up > bound else math.nextafter(up, math.inf)
    below = down if down < bound else math.nextafter(down, -math.inf)
    return above, up, below, down


_Bounds = tuple[Callable[[int | float], tuple[Any, Any, Any, Any]], int | float, int | float]
INTEGER_BOUNDS: _Bounds = (_integer_bounds, INT64.min, INT64.max)
FLOAT_BOUNDS: _Bounds = (_float_bounds, -math.inf, math.inf)


def interval(operator: str, bound: int | float, kind: _Bounds) -> tuple[int | float, int | float]:
    """Return the closed interval of a column's type that `operator bound` selects; low > high where it is empty."""
    around, lowest, highest = kind
    above, up, below, down = around(bound)
    low = {"$gt": above, "$gte": up}.get(operator, lowest)
    high = {"$lt": below, "$lte": down}.get(operator, highest)
    return max(low, lowest), min(high, highest)
