"""
Which rows match a filter: bitmaps per keyword value, NumPy columns for numbers and dates.

Rows are only ever added, and what a row holds never changes. So what a filter selects among the first rows stays true:
it is kept, and only later rows are looked at when the filter comes again. Which rows are live is the caller's knowledge
and comes with each question, so that a search that began before a change resolves its filter as of then.
"""

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import ormsgpack
from pyroaring import BitMap

from services.common.errors import InvalidInput
from services.search.filters import And, Condition, Expression, Not, Or, Scalar
from services.search.kinds import Kinds, microseconds
from services.search.ports import AttributeKind, MetadataValue
from services.search.shards.columns import FLOAT_BOUNDS, INT64, INTEGER_BOUNDS, Column, interval, nearest
from services.search.shards.files import Damaged

MAX_FACET_VALUES = 10_000  # Counting looks at every distinct value of a field.

_MAX_KEPT_FILTERS = 128


class AttributeIndex:
    """The metadata of rows, by field. One writer and many readers may use it at once."""

    def __init__(self, kinds: Kinds = None) -> None:
        """Index the fields of *kinds*, or every field where that is None."""
        self._kinds = kinds
        self._fields: dict[str, _Field] = {}
        self._rows = 0
        # By a filter's key: up to which row it was resolved, and the rows it selects among those.
        self._kept: OrderedDict[str, tuple[int, BitMap]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, row: int, metadata: Mapping[str, MetadataValue]) -> None:
        """Add *row*; rows arrive in ascending order, each once."""
        with self._lock:
            for name, value in metadata.items():
                kind = "any" if self._kinds is None else self._kinds.get(name)
                if kind is not None:
                    self._field(name, kind).add(row, value)
            self._rows = row + 1

    def resolve(self, expression: Expression, live: BitMap) -> BitMap:
        """Return those rows of *live* that match, as a bitmap that nobody else holds."""
        key = expression.key()
        with self._lock:
            resolved, rows = self._kept.pop(key, (0, BitMap()))
            if resolved < self._rows:
                rows = rows | self._match(expression, resolved)
            self._kept[key] = (self._rows, rows)
            if len(self._kept) > _MAX_KEPT_FILTERS:
                self._kept.popitem(last=False)
        return rows & live

    def estimate(self, expression: Expression, live: BitMap) -> float:
        """Return about how many rows of *live* match, from counts and samples, as if fields had nothing to do with each other."""
        with self._lock:
            return self._share(expression) * len(live)

    def counts(self, field: str, rows: BitMap, limit: int) -> dict[str, int]:
        """
        Return how many of *rows* have each value of *field*, the *limit* commonest first; lists count in each element.

        Raises:
            InvalidInput: The field has too many distinct values to count, or is not indexed.
        """
        if self._kinds is not None and field not in self._kinds:
            raise InvalidInput(f"facets.{field}: is not indexed in this collection", param=f"facets.{field}")
        with self._lock:
            found = self._fields.get(field)
            return {} if found is None else found.counts(field, rows, limit)

    def freeze(self) -> bytes:
        """Return all of it as bytes that `load` reads."""
        with self._lock:
            return ormsgpack.packb(
                {"rows": self._rows, "fields": {name: field.freeze() for name, field in self._fields.items()}}
            )

    @classmethod
    def load(cls, frozen: bytes, kinds: Kinds = None) -> "AttributeIndex":
        """Return the index that `freeze` wrote. Raises Damaged."""
        made = cls(kinds)
        try:
            content = ormsgpack.unpackb(frozen)
            made._rows = int(content["rows"])
            made._fields = {name: _Field.load(field) for name, field in content["fields"].items()}
        except Exception as error:  # Whatever the bytes make the parsers do.
            raise Damaged(f"the attributes cannot be read: {error}") from error
        return made

    def _field(self, name: str, kind: AttributeKind) -> "_Field":
        field = self._fields.get(name)
        if field is None:
            field = self._fields[name] = _Field(dates=kind == "date")
        return field

    def _match(self, expression: Expression, first_row: int) -> BitMap:
        """Return the rows from *first_row* on that match, live or not; the bitmap may be the index's own."""
        match expression:
            case And(operands):
                return reduce(BitMap.__and__, (self._match(operand, first_row) for operand in operands))
            case Or(operands):
                return BitMap.union(*(self._match(operand, first_row) for operand in operands))
            case Not(operand):
                return BitMap(range(first_row, self._rows)) - self._match(operand, first_row)
        field = self._fields.get(expression.field)
        return BitMap() if field is None else field.match(expression, first_row)

    def _share(self, expression: Expression) -> float:
        match expression:
            case And(operands):
                return float(np.prod([self._share(operand) for operand in operands]))
            case Or(operands):
                return 1.0 - float(np.prod([1.0 - self._share(operand) for operand in operands]))
            case Not(operand):
                return 1.0 - self._share(operand)
        field = self._fields.get(expression.field)
        return 0.0 if field is None or not self._rows else min(1.0, field.estimate(expression) / self._rows)


class _Postings:
    """Rows by value. Most values of some fields have one row, which then is a number: a bitmap is ten times as large."""

    def __init__(self) -> None:
        self._rows: dict[str | bool, int | BitMap] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, value: object) -> bool:
        return value in self._rows

    def __iter__(self) -> Iterator[str | bool]:
        return iter(self._rows)

    def add(self, value: str | bool, row: int) -> None:
        rows = self._rows.get(value)
        if rows is None:
            self._rows[value] = row
        elif isinstance(rows, int):
            self._rows[value] = BitMap((rows, row))
        else:
            rows.add(row)

    def count(self, value: str | bool) -> int:
        rows = self._rows.get(value)
        return 0 if rows is None else 1 if isinstance(rows, int) else len(rows)

    def rows(self, values: Iterable[str | bool]) -> BitMap:
        """Return the rows that have any of *values*; the bitmap may be the index's own."""
        found = [rows for value in values if (rows := self._rows.get(value)) is not None]
        bitmaps = [rows for rows in found if not isinstance(rows, int)]
        single = [rows for rows in found if isinstance(rows, int)]
        if len(bitmaps) == 1 and not single:
            return bitmaps[0]
        return BitMap.union(BitMap(single), *bitmaps)

    def counts(self, rows: BitMap) -> Iterator[tuple[str, int]]:
        """Yield each value that some of *rows* have, as text, with how many."""
        for value, own in self._rows.items():
            count = int(own in rows) if isinstance(own, int) else own.intersection_cardinality(rows)
            if count:
                yield (value if isinstance(value, str) else str(value).lower()), count

    def freeze(self) -> list[Any]:
        return [[value, rows if isinstance(rows, int) else rows.serialize()] for value, rows in self._rows.items()]

    @classmethod
    def load(cls, frozen: Iterable[Any]) -> "_Postings":
        made = cls()
        made._rows = {value: rows if isinstance(rows, int) else BitMap.deserialize(rows) for value, rows in frozen}
        return made


class _Field:
    """One metadata field: who has it, and with what value."""

    def __init__(self, *, dates: bool) -> None:
        self._dates = dates
        self._present = BitMap()
        self._scalars = _Postings()
        self._elements = _Postings()
        self._integers = Column(np.int64)
        self._floats = Column(np.float64)
        self._strings: list[str] = []
        self._in_order = True

    def add(self, row: int, value: MetadataValue) -> None:
        self._present.add(row)
        if self._dates:
            moment = microseconds(value)
            if moment is not None:
                self._integers.append(row, moment)
        elif isinstance(value, list):
            for element in value:
                self._elements.add(element, row)
        elif isinstance(value, (str, bool)):
            if isinstance(value, str) and value not in self._scalars:
                self._strings.append(value)
                self._in_order = False
            self._scalars.add(value, row)
        elif isinstance(value, int) and INT64.min <= value <= INT64.max:
            self._integers.append(row, value)
        else:
            self._floats.append(row, nearest(value))

    def match(self, condition: Condition, first_row: int) -> BitMap:
        """Return the rows for which *condition* holds; numbers only from *first_row* on."""
        value = self._readable(condition.value)
        match condition.operator:
            case "$exists":
                return self._present
            case "$contains":
                return self._elements.rows((value,))
            case "$eq":
                return self._any_of((value,), first_row)
            case "$in":
                return self._any_of(value, first_row)
        if isinstance(value, str):
            return self._scalars.rows(self._strings_beyond(condition.operator, value))
        return self._integers.between(
            *interval(condition.operator, value, INTEGER_BOUNDS), first_row
        ) | self._floats.between(*interval(condition.operator, value, FLOAT_BOUNDS), first_row)

    def estimate(self, condition: Condition) -> float:
        """Return about for how many rows *condition* holds."""
        value = self._readable(condition.value)
        match condition.operator:
            case "$exists":
                return len(self._present)
            case "$contains":
                return self._elements.count(value)
            case "$eq" | "$in":
                values = value if condition.operator == "$in" else (value,)
                return sum(map(self._estimate_equal, values))
        if isinstance(value, str):
            share = len(self._strings_beyond(condition.operator, value)) / max(1, len(self._strings))
            return share * len(self._present)
        return self._integers.estimate(*interval(condition.operator, value, INTEGER_BOUNDS)) + self._floats.estimate(
            *interval(condition.operator, value, FLOAT_BOUNDS)
        )

    def counts(self, name: str, rows: BitMap, limit: int) -> dict[str, int]:
        """Return the commonest values among *rows*."""
        distinct = len(self._scalars) + len(self._elements)
        if distinct > MAX_FACET_VALUES:
            raise InvalidInput(
                f"facets.{name}: has {distinct:,} distinct values; at most {MAX_FACET_VALUES:,} can be counted",
                param=f"facets.{name}",
            )
        numbers = chain(self._integers.counts(rows, limit), self._floats.counts(rows, limit))
        found: dict[str, int] = {}
        for value, count in chain(
            self._scalars.counts(rows), self._elements.counts(rows), ((str(number), n) for number, n in numbers)
        ):
            found[value] = found.get(value, 0) + count
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:limit]
        return dict(best)

    def freeze(self) -> dict[str, Any]:
        return {
            "dates": self._dates,
            "present": self._present.serialize(),
            "scalars": self._scalars.freeze(),
            "elements": self._elements.freeze(),
            "integers": self._integers.freeze(),
            "floats": self._floats.freeze(),
        }

    @classmethod
    def load(cls, frozen: Mapping[str, Any]) -> "_Field":
        made = cls(dates=bool(frozen["dates"]))
        made._present = BitMap.deserialize(frozen["present"])
        made._scalars = _Postings.load(frozen["scalars"])
        made._elements = _Postings.load(frozen["elements"])
        made._integers = Column.load(np.int64, frozen["integers"])
        made._floats = Column.load(np.float64, frozen["floats"])
        made._strings = [value for value in made._scalars if isinstance(value, str)]
        made._in_order = False
        return made

    def _readable(self, value: Any) -> Any:
        """Return a condition's value as the field holds it."""
        if not self._dates or isinstance(value, bool):
            return value
        return tuple(map(microseconds, value)) if isinstance(value, tuple) else microseconds(value)

    def _any_of(self, values: Iterable[Scalar], first_row: int) -> BitMap:
        words: list[str | bool] = []
        numbers: list[int | float] = []
        for value in values:
            (words if isinstance(value, (str, bool)) else numbers).append(value)  # type: ignore[arg-type]
        found = [self._scalars.rows(words), self._elements.rows(word for word in words if isinstance(word, str))]
        if numbers:
            whole = [int(number) for number in numbers if int(number) == number]
            found.append(self._integers.any_of([n for n in whole if INT64.min <= n <= INT64.max], first_row))
            exact = [nearest(number) for number in numbers if nearest(number) == number]
            found.append(self._floats.any_of(exact, first_row))
        return BitMap.union(*found)

    def _estimate_equal(self, value: Scalar) -> float:
        if isinstance(value, (str, bool)):
            return self._scalars.count(value) + self._elements.count(value)
        return self._integers.estimate(value, value) + self._floats.estimate(value, value)

    def _strings_beyond(self, operator: str, bound: str) -> list[str]:
        if not self._in_order:
            self._strings.sort()
            self._in_order = True
        cut = (bisect_right if operator in ("$gt", "$lte") else bisect_left)(self._strings, bound)
        return self._strings[cut:] if operator in ("$gt", "$gte") else self._strings[:cut]
