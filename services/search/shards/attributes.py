"""
Which rows match a filter: bitmaps per keyword value, NumPy columns for numbers.

Rows are only ever added. Which of them are live is the caller's knowledge and comes with each question, so that a
search that began before a change resolves its filter as of then.
"""

import array
import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from services.search.filters import And, Condition, Expression, Not, Or, Scalar
from services.search.ports import MetadataValue

_INT64 = np.iinfo(np.int64)
_FIRST_CAPACITY = 64


class AttributeIndex:
    """The metadata of rows, by field. One writer and many readers may use it at once."""

    def __init__(self) -> None:
        self._fields: dict[str, _Field] = {}
        self._lock = threading.Lock()

    def add(self, row: int, metadata: Mapping[str, MetadataValue]) -> None:
        """Add *row*; rows arrive in ascending order, each once."""
        with self._lock:
            for name, value in metadata.items():
                self._fields.setdefault(name, _Field()).add(row, value)

    def resolve(self, expression: Expression, live: BitMap) -> BitMap:
        """Return those rows of *live* that match, as a bitmap that nobody else holds."""
        with self._lock:
            return self._match(expression, live) & live

    def _match(self, expression: Expression, live: BitMap) -> BitMap:
        """Return the rows that match; among them may be some that are not live, and the bitmap may be shared."""
        match expression:
            case And(operands):
                return reduce(BitMap.__and__, (self._match(operand, live) for operand in operands))
            case Or(operands):
                return BitMap.union(*(self._match(operand, live) for operand in operands))
            case Not(operand):
                return live - self._match(operand, live)
        field = self._fields.get(expression.field)
        return BitMap() if field is None else field.match(expression)


class _Field:
    """One metadata field: who has it, and with what value."""

    def __init__(self) -> None:
        self._present = BitMap()
        self._scalars: dict[str | bool, BitMap] = {}
        self._elements: dict[str, BitMap] = {}
        self._integers = _Column(np.int64)
        self._floats = _Column(np.float64)
        self._strings: list[str] = []
        self._in_order = True

    def add(self, row: int, value: MetadataValue) -> None:
        self._present.add(row)
        if isinstance(value, list):
            for element in value:
                self._elements.setdefault(element, BitMap()).add(row)
        elif isinstance(value, (str, bool)):
            if isinstance(value, str) and value not in self._scalars:
                self._strings.append(value)
                self._in_order = False
            self._scalars.setdefault(value, BitMap()).add(row)
        elif isinstance(value, int) and _INT64.min <= value <= _INT64.max:
            self._integers.append(row, value)
        else:
            self._floats.append(row, _nearest(value))

    def match(self, condition: Condition) -> BitMap:
        """Return the rows for which *condition* holds; the bitmap may be one of the index's own."""
        value: Any = condition.value
        match condition.operator:
            case "$exists":
                return self._present
            case "$contains":
                return self._elements.get(value, BitMap())
            case "$eq":
                return self._any_of((value,))
            case "$in":
                return self._any_of(value)
        if isinstance(value, str):
            return self._strings_beyond(condition.operator, value)
        return self._integers.between(*_interval(condition.operator, value, _INTEGER_BOUNDS)) | self._floats.between(
            *_interval(condition.operator, value, _FLOAT_BOUNDS)
        )

    def _any_of(self, values: Iterable[Scalar]) -> BitMap:
        found: list[BitMap] = []
        numbers: list[int | float] = []
        for value in values:
            if isinstance(value, (str, bool)):
                found.extend(rows for rows in (self._scalars.get(value), self._element(value)) if rows is not None)
            else:
                numbers.append(value)
        if numbers:
            whole = [int(number) for number in numbers if int(number) == number]
            found.append(self._integers.any_of([n for n in whole if _INT64.min <= n <= _INT64.max]))
            found.append(self._floats.any_of([_nearest(number) for number in numbers if _nearest(number) == number]))
        return BitMap.union(*found) if found else BitMap()

    def _element(self, value: str | bool) -> BitMap | None:
        return self._elements.get(value) if isinstance(value, str) else None

    def _strings_beyond(self, operator: str, bound: str) -> BitMap:
        if not self._in_order:
            self._strings.sort()
            self._in_order = True
        cut = (bisect_right if operator in ("$gt", "$lte") else bisect_left)(self._strings, bound)
        chosen = self._strings[cut:] if operator in ("$gt", "$gte") else self._strings[:cut]
        return BitMap.union(*(self._scalars[value] for value in chosen)) if chosen else BitMap()


class _Column:
    """Numbers by row, in arrays that double when full."""

    def __init__(self, dtype: type[np.int64] | type[np.float64]) -> None:
        self._rows = np.empty(0, np.uint32)
        self._values: NDArray[Any] = np.empty(0, dtype)
        self._count = 0

    def append(self, row: int, value: int | float) -> None:
        if self._count == len(self._rows):
            capacity = max(_FIRST_CAPACITY, 2 * self._count)
            self._rows = np.resize(self._rows, capacity)
            self._values = np.resize(self._values, capacity)
        self._rows[self._count] = row
        self._values[self._count] = value
        self._count += 1

    def between(self, low: int | float, high: int | float) -> BitMap:
        """Return the rows with low ≤ value ≤ high."""
        if not self._count or low > high:
            return BitMap()
        values = self._values[: self._count]
        return self._where((values >= low) & (values <= high))

    def any_of(self, numbers: list[int] | list[float]) -> BitMap:
        """Return the rows with one of *numbers*, which the column's type can hold exactly."""
        if not self._count or not numbers:
            return BitMap()
        return self._where(np.isin(self._values[: self._count], np.array(numbers, self._values.dtype)))

    def _where(self, mask: NDArray[np.bool_]) -> BitMap:
        # An array.array is what BitMap reads as a block; it would take a NumPy array number by number.
        return BitMap(array.array("I", self._rows[: self._count][mask].tobytes()))


def _nearest(number: int | float) -> float:
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
    near = _nearest(bound)
    up = near if near >= bound else math.nextafter(near, math.inf)
    down = near if near <= bound else math.nextafter(near, -math.inf)
    above = up if up > bound else math.nextafter(up, math.inf)
    below = down if down < bound else math.nextafter(down, -math.inf)
    return above, up, below, down


_Bounds = tuple[Callable[[int | float], tuple[Any, Any, Any, Any]], int | float, int | float]
_INTEGER_BOUNDS: _Bounds = (_integer_bounds, _INT64.min, _INT64.max)
_FLOAT_BOUNDS: _Bounds = (_float_bounds, -math.inf, math.inf)


def _interval(operator: str, bound: int | float, kind: _Bounds) -> tuple[int | float, int | float]:
    """Return the closed interval of a column's type that `operator bound` selects; low > high where it is empty."""
    around, lowest, highest = kind
    above, up, below, down = around(bound)
    low = {"$gt": above, "$gte": up}.get(operator, lowest)
    high = {"$lt": below, "$lte": down}.get(operator, highest)
    return max(low, lowest), min(high, highest)
