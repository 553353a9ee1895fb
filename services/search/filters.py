"""
Filters on metadata: a Mongo-style dict becomes a frozen expression tree.

    {"lang": "en", "year": {"$gte": 2020, "$lt": 2024}, "$or": [{"tags": {"$contains": "ml"}}, {"draft": false}]}

* A bare value means `$eq`; several fields, or several operators on one field, must all hold; `{}` is everything.
* A field that a document lacks matches only `$ne`, `$nin`, `$exists: false` and `$not`.
* `$gt $gte $lt $lte` compare numbers with numbers and strings with strings (by code point, so ISO dates are in
  order), never one with the other; a list matches none of them. Booleans are not numbers; 1 equals 1.0.
* `$eq` and `$in` match a list of strings when any element equals. `$contains` is membership in a list, and never
  matches a plain string. `$ne` and `$nin` are the opposites of `$eq` and `$in`.
* Integers beyond 64 bits are compared as the nearest float.
* A field that the collection declares as `date` takes ISO 8601 strings and numbers of seconds since 1970, and compares
  moments. Where a collection declares its attributes, other fields cannot be filtered on.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from services.common.errors import InvalidInput
from services.search.kinds import Kinds, canonical_date, fits, kind_of, microseconds, misfit
from services.search.ports import AttributeKind, MetadataValue

MAX_DEPTH = 8
MAX_CONDITIONS = 256
MAX_IN_VALUES = 10_000
MAX_FIELD_CHARS = 128

Scalar = str | int | float | bool
Operator = Literal["$eq", "$in", "$gt", "$gte", "$lt", "$lte", "$exists", "$contains"]

_JUNCTIONS = ("$and", "$or", "$not")
_NEGATED: dict[str, str] = {"$eq": "$ne", "$in": "$nin"}
_FIELD_OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$contains", "$not")


class _Node:
    """What all nodes can do."""

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the filter as a dict that `parse_filter` reads back to an equal tree."""
        raise NotImplementedError

    def key(self) -> str:
        """Return a canonical text: equal for filters that differ only in order or repetition."""
        return json.dumps(self.as_dict(), separators=(",", ":"), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Condition(_Node):
    """One test of one field. *value* is a tuple for `$in`, and always True for `$exists`."""

    field: str
    operator: Operator
    value: Scalar | tuple[Scalar, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the condition as a dict."""
        return {self.field: {self.operator: self.value}}


@dataclass(frozen=True, slots=True)
class Not(_Node):
    """Holds where *operand* does not."""

    operand: "Expression"

    def as_dict(self) -> dict[str, Any]:
        """Return the negation as a dict, by the opposite operator where there is one."""
        match self.operand:
            case Condition(field, "$exists"):
                return {field: {"$exists": False}}
            case Condition(field, "$eq" | "$in" as operator, value):
                return {field: {_NEGATED[operator]: value}}
        return {"$not": self.operand.as_dict()}


@dataclass(frozen=True, slots=True)
class And(_Node):
    """Holds where all *operands* do; they are at least two, in canonical order."""

    operands: tuple["Expression", ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the conjunction as a dict."""
        return {"$and": [operand.as_dict() for operand in self.operands]}


@dataclass(frozen=True, slots=True)
class Or(_Node):
    """Holds where any of *operands* does; they are at least two, in canonical order."""

    operands: tuple["Expression", ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the disjunction as a dict."""
        return {"$or": [operand.as_dict() for operand in self.operands]}


Expression = Condition | Not | And | Or


def parse_filter(source: Any, kinds: Kinds = None) -> Expression | None:
    """
    Return *source* as an expression; None, which is everything, for None and for an empty dict.

    *kinds* are the collection's indexed attributes; None stands for all fields, of any kind.

    Raises:
        InvalidInput: Something in it is wrong; *param* is the path to it.
    """
    if source is None or source == {}:
        return None
    expression = _Parser(kinds).filter(source, "filter", MAX_DEPTH)
    if _depth(expression) > MAX_DEPTH:
        raise _too_deep("filter")
    return expression


def matches(expression: Expression | None, metadata: Mapping[str, MetadataValue], kinds: Kinds = None) -> bool:
    """Whether one document's *metadata* is what *expression*, parsed with the same *kinds*, asks for."""
    match expression:
        case None:
            return True
        case And(operands):
            return all(matches(operand, metadata, kinds) for operand in operands)
        case Or(operands):
            return any(matches(operand, metadata, kinds) for operand in operands)
        case Not(operand):
            return not matches(operand, metadata, kinds)
    stored: Any = metadata.get(expression.field)
    if stored is None:
        return False
    value: Any = expression.value
    if kinds is not None and kinds.get(expression.field) == "date":
        stored = microseconds(stored)
        value = tuple(map(microseconds, value)) if isinstance(value, tuple) else microseconds(value)
    match expression.operator:
        case "$exists":
            return True
        case "$contains":
            return isinstance(stored, list) and value in stored
        case "$eq":
            return _equals(stored, value)
        case "$in":
            return any(_equals(stored, item) for item in value)
    return (
        not isinstance(stored, list) and _class(stored) == _class(value) and _beyond(expression.operator, stored, value)
    )


def _equals(stored: Any, value: Any) -> bool:
    if isinstance(stored, list):
        return isinstance(value, str) and value in stored
    return _class(stored) == _class(value) and bool(stored == value)


def _class(value: Any) -> type:
    """Return what values must share to be compared: str, bool, or float for every number."""
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def _beyond(operator: str, stored: Any, bound: Any) -> bool:
    match operator:
        case "$gt":
            return bool(stored > bound)
        case "$gte":
            return bool(stored >= bound)
        case "$lt":
            return bool(stored < bound)
    return bool(stored <= bound)


class _Parser:
    """One parse: recursion over the dict, counting conditions. *room* is how many levels may still follow."""

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._conditions = 0

    def filter(self, source: Any, path: str, room: int) -> Expression:
        if not isinstance(source, dict) or not source:
            raise InvalidInput("A filter must be an object with at least one condition.", param=path)
        return _join(And, [self._entry(name, value, f"{path}.{name}", room) for name, value in source.items()])

    def _entry(self, name: Any, value: Any, path: str, room: int) -> Expression:
        if room < 1:
            raise _too_deep(path)
        if name == "$not":
            return Not(self.filter(value, path, room - 1))
        if name in ("$and", "$or"):
            if not isinstance(value, list) or not value:
                raise InvalidInput(f"{name} takes a list of at least one filter.", param=path)
            operands = [self.filter(part, f"{path}[{index}]", room - 1) for index, part in enumerate(value)]
            return _join(And if name == "$and" else Or, operands)
        if not isinstance(name, str) or not 0 < len(name) <= MAX_FIELD_CHARS:
            raise InvalidInput(f"A field name has 1 to {MAX_FIELD_CHARS} characters.", param=path)
        if name.startswith("$"):
            if name in _FIELD_OPERATORS:
                raise InvalidInput(f'{name} belongs to a field: {{"field": {{"{name}": …}}}}.', param=path)
            raise _unknown(name, _JUNCTIONS, path)
        if isinstance(value, dict):
            return self._operators(name, value, path, room)
        return self._condition(name, "$eq", value, path)

    def _operators(self, field: str, operators: dict[Any, Any], path: str, room: int) -> Expression:
        if room < 1:
            raise _too_deep(path)
        if not operators:
            raise InvalidInput("A field needs at least one operator.", param=path)
        parts: list[Expression] = []
        for name, value in operators.items():
            where = f"{path}.{name}"
            if not isinstance(name, str) or not name.startswith("$"):
                raise InvalidInput("Metadata is flat: an operator such as $eq is expected here.", param=where)
            if name == "$not":
                if not isinstance(value, dict):
                    raise InvalidInput("$not takes an object of operators here.", param=where)
                parts.append(Not(self._operators(field, value, where, room - 1)))
            else:
                parts.append(self._condition(field, name, value, where))
        return _join(And, parts)

    def _condition(self, field: str, operator: str, value: Any, path: str) -> Expression:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise InvalidInput(f"A filter has at most {MAX_CONDITIONS} conditions.", param=path)
        kind = kind_of(field, self._kinds, path)
        match operator:
            case "$eq":
                return Condition(field, "$eq", _of_kind(field, _scalar(value, path), kind, path))
            case "$ne":
                return Not(Condition(field, "$eq", _of_kind(field, _scalar(value, path), kind, path)))
            case "$in":
                return Condition(field, "$in", _scalars(field, value, kind, path))
            case "$nin":
                return Not(Condition(field, "$in", _scalars(field, value, kind, path)))
            case "$gt" | "$gte" | "$lt" | "$lte":
                bound = _of_kind(field, _scalar(value, path), kind, path)
                if isinstance(bound, bool):
                    raise InvalidInput(f"{operator} takes a number or a string.", param=path)
                return Condition(field, operator, bound)
            case "$exists":
                if not isinstance(value, bool):
                    raise InvalidInput("$exists takes true or false.", param=path)
                present = Condition(field, "$exists", True)
                return present if value else Not(present)
            case "$contains":
                if not isinstance(value, str):
                    raise InvalidInput("$contains takes a string: lists hold strings only.", param=path)
                if kind not in ("any", "keyword"):
                    raise InvalidInput(f"$contains is for lists, and {field!r} is indexed as {kind}.", param=path)
                return Condition(field, "$contains", value)
        raise _unknown(operator, _FIELD_OPERATORS, path)


def _join(kind: type[And] | type[Or], operands: Iterable[Expression]) -> Expression:
    """Return *operands* as one node: nested ones of the same kind flattened, repeated ones dropped, in key order."""
    flat: dict[str, Expression] = {}
    for operand in operands:
        for part in operand.operands if isinstance(operand, kind) else (operand,):
            flat[part.key()] = part
    ordered = tuple(flat[key] for key in sorted(flat))
    return ordered[0] if len(ordered) == 1 else kind(ordered)


def _depth(expression: Expression) -> int:
    """Return how many levels `as_dict` nests."""
    match expression:
        case Condition() | Not(Condition(_, "$eq" | "$in" | "$exists")):
            return 1
        case Not(operand):
            return 1 + _depth(operand)
    return 1 + max(_depth(operand) for operand in expression.operands)


def _scalar(value: Any, path: str) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput("A number must be finite.", param=path)
    if isinstance(value, (str, bool, int, float)):
        return value
    hint = " Use $exists to find documents without the field." if value is None else ""
    hint = " Use $in for one of several values." if isinstance(value, list) else hint
    raise InvalidInput(f"A string, a number or a boolean is expected.{hint}", param=path)


def _of_kind(field: str, value: Scalar, kind: AttributeKind, path: str) -> Scalar:
    """Return *value* as conditions on a field of *kind* hold it: a date as one string for each moment."""
    if kind == "date":
        date = canonical_date(value)
        if date is None:
            raise misfit(field, kind, path)
        return date
    if not fits(value, kind):
        raise misfit(field, kind, path)
    return value


def _scalars(field: str, value: Any, kind: AttributeKind, path: str) -> tuple[Scalar, ...]:
    if not isinstance(value, list):
        raise InvalidInput("A list of values is expected.", param=path)
    if len(value) > MAX_IN_VALUES:
        raise InvalidInput(f"At most {MAX_IN_VALUES:,} values can be listed.", param=path)
    # By type as well: True == 1 in Python, and they are different values here.
    checked = (_of_kind(field, _scalar(item, f"{path}[]"), kind, f"{path}[]") for item in value)
    distinct = {(type(item).__name__, item): item for item in checked}
    return tuple(distinct[key] for key in sorted(distinct))


def _unknown(name: str, known: tuple[str, ...], path: str) -> InvalidInput:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}?" if close else f"There are: {' '.join(known)}."
    return InvalidInput(f"There is no operator {name[:40]} here. {hint}", param=path)


def _too_deep(path: str) -> InvalidInput:
    return InvalidInput(f"A filter nests at most {MAX_DEPTH} levels deep.", param=path)
