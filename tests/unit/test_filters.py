"""Filters: what is refused, what is canonical, and that the attribute index does what the rules say."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from services.common.errors import InvalidInput
from services.search.filters import And, Condition, Expression, Not, Or, parse_filter
from services.search.shards.attributes import AttributeIndex

_COMPARE = {
    "$gt": lambda value, bound: value > bound,
    "$gte": lambda value, bound: value >= bound,
    "$lt": lambda value, bound: value < bound,
    "$lte": lambda value, bound: value <= bound,
}


def _kind(value: Any) -> str:
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def _equals(value: Any, other: Any) -> bool:
    if isinstance(value, list):
        return other in value if isinstance(other, str) else False
    return _kind(value) == _kind(other) and value == other


def _test(operator: str, stored: Any, value: Any) -> bool:
    match operator:
        case "$eq":
            return _equals(stored, value)
        case "$ne":
            return not _equals(stored, value)
        case "$in":
            return any(_equals(stored, item) for item in value)
        case "$nin":
            return not any(_equals(stored, item) for item in value)
        case "$exists":
            return value
        case "$contains":
            return isinstance(stored, list) and value in stored
        case "$not":
            return not all(_test(name, stored, inner) for name, inner in value.items())
    return _kind(stored) == _kind(value) and not isinstance(stored, list) and _COMPARE[operator](stored, value)


def _missing(operator: str, value: Any) -> bool:
    if operator == "$not":
        return not all(_missing(name, inner) for name, inner in value.items())
    return operator in ("$ne", "$nin") or (operator == "$exists" and not value)


def naive(source: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Evaluate an unparsed filter on one document."""

    def one(name: str, value: Any) -> bool:
        if name == "$and":
            return all(naive(part, metadata) for part in value)
        if name == "$or":
            return any(naive(part, metadata) for part in value)
        if name == "$not":
            return not naive(value, metadata)
        tests = value if isinstance(value, dict) else {"$eq": value}
        if name not in metadata:
            return all(_missing(operator, inner) for operator, inner in tests.items())
        return all(
            (operator != "$exists" or inner) and _test(operator, metadata[name], inner)
            for operator, inner in tests.items()
        )

    return all(one(name, value) for name, value in source.items())


# Few values, so that they meet; among the numbers those where int and float comparison differ.
_big = 2**53
_words = st.sampled_from(["", "a", "b", "A", "é", "2024-01-31", "2024-02-01"])
_numbers = st.one_of(
    st.integers(-2, 2),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 1e300, -1e300]),
    st.sampled_from([_big, _big + 1, float(_big), float(_big + 2), 2**63 - 1, -(2**63), float(2**63), 10**400]),
)
_scalars = st.one_of(_words, _numbers, st.booleans())
# What is stored fits in 64 bits, except for floats.
_stored = st.one_of(
    _words, _numbers.filter(lambda number: abs(number) < 10**301), st.booleans(), st.lists(_words, max_size=3)
)
_names = st.sampled_from(["x", "y", "z"])
_metadata = st.dictionaries(_names, _stored, max_size=3)
_simple_operators = st.one_of(
    st.fixed_dictionaries({}, optional={"$eq": _scalars, "$ne": _scalars}),
    st.dictionaries(
        st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), st.one_of(_words, _numbers), min_size=1, max_size=2
    ),
    st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(_scalars, max_size=4), min_size=1, max_size=1),
    st.fixed_dictionaries({}, optional={"$exists": st.booleans(), "$contains": _words}),
).filter(bool)
_operators = st.one_of(_simple_operators, st.fixed_dictionaries({"$not": _simple_operators}))
_leaves = st.dictionaries(_names, st.one_of(_scalars, _operators), min_size=1, max_size=2)
_filters = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$not": inner}),
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_metadata, max_size=12), _filters, st.sets(st.integers(0, 11)))
def test_resolving_a_filter_equals_evaluating_it_on_each_live_document(documents, source, dead):
    """The bitmap of a filter has exactly the live rows whose metadata satisfies it."""
    index = AttributeIndex()
    for row, metadata in enumerate(documents):
        index.add(row, metadata)
    live = BitMap(set(range(len(documents))) - dead)
    expression = parse_filter(source)
    assert expression is not None
    assert set(index.resolve(expression, live)) == {row for row in live if naive(source, documents[row])}


@settings(max_examples=200, deadline=None)
@given(_filters)
def test_the_key_is_a_filter_that_parses_to_the_same_key(source):
    """The canonical text of a filter is itself the filter."""
    expression = parse_filter(source)
    assert expression is not None
    assert parse_filter(json.loads(expression.key())).key() == expression.key()


def test_resolving_does_not_hand_out_the_index_itself():
    """A caller that changes the bitmap it got does not change later answers."""
    index = AttributeIndex()
    index.add(0, {"lang": "en"})
    expression = Condition("lang", "$exists", True)
    index.resolve(expression, BitMap([0])).add(7)
    assert set(index.resolve(expression, BitMap([0, 7]))) == {0}


def test_nothing_is_everything():
    """None and an empty object are no filter."""
    assert parse_filter(None) is None
    assert parse_filter({}) is None


def test_order_and_repetition_do_not_change_the_key():
    """Filters that differ only in the order or repetition of conditions share one cache entry."""
    one = parse_filter({"a": 1, "b": {"$in": ["x", "y", "x"]}})
    other = parse_filter({"$and": [{"b": {"$in": ["y", "x"]}}, {"a": {"$eq": 1}}, {"a": 1}]})
    assert one is not None
    assert other is not None
    assert one.key() == other.key()


@pytest.mark.parametrize(("left", "right"), [(True, 1), ("1", 1), (False, 0), ("true", True)])
def test_values_of_different_types_have_different_keys(left, right):
    """A boolean, a number and a string that look alike are different values."""
    keys = {parse_filter({"a": value}).key() for value in (left, right)}
    assert len(keys) == 2
    assert len(parse_filter({"a": {"$in": [left, right]}}).value) == 2


def test_negative_operators_are_negations():
    """The tree knows only positive tests; the opposites are Not nodes."""
    assert parse_filter({"a": {"$ne": 1}}) == Not(Condition("a", "$eq", 1))
    assert parse_filter({"a": {"$exists": False}}) == Not(Condition("a", "$exists", True))
    assert parse_filter({"$not": {"a": 1}}) == Not(Condition("a", "$eq", 1))
    assert parse_filter({"a": {"$not": {"$gt": 1}}}) == Not(Condition("a", "$gt", 1))


def test_several_operators_on_a_field_must_all_hold():
    """A range is written as two operators on one field."""
    expected: Expression = And((Condition("a", "$gte", 1), Condition("a", "$lt", 2)))
    assert parse_filter({"a": {"$gte": 1, "$lt": 2}}) == expected


def test_a_single_operand_needs_no_junction():
    """`$or` of one filter is that filter."""
    assert parse_filter({"$or": [{"a": 1}]}) == Condition("a", "$eq", 1)
    assert isinstance(parse_filter({"$or": [{"a": 1}, {"b": 1}]}), Or)


@pytest.mark.parametrize(
    ("source", "param", "says"),
    [
        ([], "filter", "object"),
        ("lang", "filter", "object"),
        ({"a": {"$gtt": 1}}, "filter.a.$gtt", "$gt"),
        ({"$nor": [{"a": 1}]}, "filter.$nor", "$or"),
        ({"$eq": 1}, "filter.$eq", "belongs to a field"),
        ({"a": {}}, "filter.a", "operator"),
        ({"a": {"b": 1}}, "filter.a.b", "flat"),
        ({"a": None}, "filter.a", "$exists"),
        ({"a": ["x"]}, "filter.a", "$in"),
        ({"a": {"$in": "x"}}, "filter.a.$in", "list"),
        ({"a": {"$in": [None]}}, "filter.a.$in[]", "expected"),
        ({"a": {"$in": list(range(10_001))}}, "filter.a.$in", "10,000"),
        ({"a": {"$gt": True}}, "filter.a.$gt", "number or a string"),
        ({"a": {"$gt": float("nan")}}, "filter.a.$gt", "finite"),
        ({"a": {"$exists": 1}}, "filter.a.$exists", "true or false"),
        ({"a": {"$contains": 1}}, "filter.a.$contains", "string"),
        ({"a": {"$not": 1}}, "filter.a.$not", "object"),
        ({"$and": []}, "filter.$and", "at least one"),
        ({"$or": {"a": 1}}, "filter.$or", "list"),
        ({"$and": [{"a": 1}, {}]}, "filter.$and[1]", "at least one"),
        ({"$not": []}, "filter.$not", "object"),
        ({"": 1}, "filter.", "characters"),
        ({"x" * 129: 1}, "filter." + "x" * 129, "characters"),
        ({"$or": [{"a": n} for n in range(257)]}, "filter.$or[256].a", "256"),
    ],
)
def test_a_wrong_filter_is_refused_with_the_path_to_the_fault(source, param, says):
    """The error names the place and how to mend it."""
    with pytest.raises(InvalidInput) as error:
        parse_filter(source)
    assert error.value.param == param
    assert says in error.value.message


def test_nesting_is_bounded():
    """Eight levels are read, nine are refused, and a thousand do not exhaust the stack."""

    def nested(levels: int) -> dict[str, Any]:
        source: dict[str, Any] = {"a": {"$gt": 1}}
        for _ in range(levels - 1):
            source = {"$not": source}
        return source

    assert parse_filter(nested(8)) is not None
    for levels in (9, 1000):
        with pytest.raises(InvalidInput, match="8 levels"):
            parse_filter(nested(levels))
