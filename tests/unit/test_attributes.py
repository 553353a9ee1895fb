"""Attributes: kinds and dates, what is kept between questions, estimates, counts, and coming back from bytes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from services.common.errors import InvalidInput
from services.search.filters import matches, parse_filter
from services.search.kinds import canonical_date, check_metadata, microseconds
from services.search.shards.attributes import MAX_FACET_VALUES, AttributeIndex
from services.search.shards.files import Damaged

KINDS = {"day": "date", "n": "number", "tag": "keyword", "on": "bool", "free": "any"}

_dates = st.sampled_from(
    ["2024-01-31", "2024-01-31T00:00:00Z", "2024-01-31T01:00:00+01:00", "2024-02-01T12:30:00.25Z", 1706659200, 0, -1.5]
)
_documents = st.fixed_dictionaries(
    {},
    optional={
        "day": _dates,
        "n": st.sampled_from([-1, 0, 1, 2.5]),
        "tag": st.sampled_from(["a", "b", ["a", "b"], []]),
        "on": st.booleans(),
        "free": st.sampled_from(["a", 1, True, ["a"]]),
        "other": st.integers(),
    },
)


def _ranges(values):
    return st.dictionaries(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), values, min_size=1, max_size=2)


_conditions = st.one_of(
    st.fixed_dictionaries(
        {"day": st.one_of(_dates, _ranges(_dates), st.fixed_dictionaries({"$nin": st.lists(_dates)}))}
    ),
    st.fixed_dictionaries({"n": st.one_of(st.sampled_from([0, 2.5]), _ranges(st.integers(-2, 2)))}),
    st.fixed_dictionaries({"tag": st.sampled_from(["a", {"$ne": "b"}, {"$contains": "b"}, {"$gt": "a"}])}),
    st.fixed_dictionaries({"on": st.booleans()}),
    st.fixed_dictionaries({"free": st.sampled_from(["a", {"$exists": False}, {"$in": [1, True]}])}),
)
_filters = st.one_of(
    _conditions,
    st.fixed_dictionaries({"$or": st.lists(_conditions, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"$not": _conditions}),
)


def index_of(documents, kinds=None):
    """Return an index of *documents* as rows 0, 1, …"""
    index = AttributeIndex(kinds)
    for row, metadata in enumerate(documents):
        index.add(row, metadata)
    return index


@settings(max_examples=200, deadline=None)
@given(st.lists(_documents, max_size=8), st.lists(_documents, max_size=8), _filters, st.sampled_from([None, KINDS]))
def test_an_index_and_one_document_at_a_time_agree_also_for_rows_that_came_later(first, later, source, kinds):
    """`resolve`, its kept answers brought up to date, and the index read back from bytes select what `matches` says."""
    if kinds is None:
        source = json.loads(json.dumps(source).replace('"day"', '"n"').replace('"on"', '"free"'))
    expression = parse_filter(source, kinds)
    index = index_of(first, kinds)
    index.resolve(expression, BitMap(range(len(first))))
    documents = [*first, *later]
    for row, metadata in enumerate(later, len(first)):
        index.add(row, metadata)
    live = BitMap(row for row in range(len(documents)) if row % 5)
    expected = {row for row in live if matches(expression, documents[row], kinds)}
    assert set(index.resolve(expression, live)) == expected
    assert set(AttributeIndex.load(index.freeze(), kinds).resolve(expression, live)) == expected
    assert parse_filter(json.loads(expression.key()), kinds).key() == expression.key()


def test_dates_compare_moments_whatever_they_are_written_as():
    """A date, a time with an offset and a number of seconds that mean the same moment are equal."""
    same = ["2024-01-31", "2024-01-31T00:00:00Z", "2024-01-31T01:00:00+01:00", 1706659200, 1706659200.0]
    assert len({microseconds(value) for value in same}) == len({canonical_date(value) for value in same}) == 1
    assert [microseconds(value) for value in ("soon", True, None, ["2024-01-31"], float("inf"), 10**400)] == [None] * 6
    latest = "9999-12-31T23:59:59.999999+00:00"
    assert canonical_date(latest) == latest
    assert microseconds(latest) - microseconds("9999-12-31T23:59:59.999998Z") == 1


@pytest.mark.parametrize(
    ("source", "param", "says"),
    [
        ({"other": 1}, "filter.other", "day, free, n, on, tag"),
        ({"$or": [{"n": 1}, {"other": {"$exists": True}}]}, "filter.$or[1].other.$exists", "not indexed"),
        ({"day": "soon"}, "filter.day", "ISO 8601"),
        ({"day": {"$in": ["2024-01-31", "soon"]}}, "filter.day.$in[]", "ISO 8601"),
        ({"day": {"$contains": "2024"}}, "filter.day.$contains", "date"),
        ({"n": "1"}, "filter.n", "a number"),
        ({"n": {"$gt": "1"}}, "filter.n.$gt", "a number"),
        ({"tag": 1}, "filter.tag", "a string"),
        ({"on": "true"}, "filter.on", "true or false"),
    ],
)
def test_a_filter_that_the_attributes_cannot_answer_is_refused(source, param, says):
    """The error names the place, and what the collection's attributes take."""
    with pytest.raises(InvalidInput) as error:
        parse_filter(source, KINDS)
    assert error.value.param == param
    assert says in error.value.message


def test_metadata_must_fit_the_declared_kinds():
    """A value of another kind is refused with its field; fields that are not declared may hold anything."""
    check_metadata({"day": "2024-01-31", "n": 1, "tag": ["a"], "on": True, "free": 1, "other": "x"}, KINDS)
    check_metadata({"day": "soon"}, None)
    for field, value in (("day", "soon"), ("n", True), ("n", "1"), ("tag", 1), ("on", 1)):
        with pytest.raises(InvalidInput) as error:
            check_metadata({field: value}, KINDS, "documents.3.metadata")
        assert error.value.param == f"documents.3.metadata.{field}"


def test_what_is_not_declared_is_not_indexed():
    """Only declared fields take memory, and only they can be counted."""
    index = index_of([{"tag": "a", "other": "x"}], {"tag": "keyword"})
    assert "other" not in str(index.freeze())
    with pytest.raises(InvalidInput, match="not indexed"):
        index.counts("other", BitMap([0]), 10)


def test_counts_are_of_the_rows_given_commonest_first():
    """Strings, list elements, booleans and numbers are counted as text; equal counts in order of the text."""
    documents = [{"x": "b"}, {"x": "a"}, {"x": ["a", "c"]}, {"x": True}, {"x": 7}, {"x": 7}, {"x": 0.5}, {}]
    index = index_of(documents)
    assert index.counts("x", BitMap(range(8)), 10) == {"7": 2, "a": 2, "0.5": 1, "b": 1, "c": 1, "true": 1}
    assert index.counts("x", BitMap([0, 2, 3]), 2) == {"a": 1, "b": 1}
    assert index.counts("x", BitMap(), 2) == index.counts("unknown", BitMap([0]), 2) == {}


def test_a_field_with_too_many_values_is_not_counted():
    """Counting every value of an id-like field is refused rather than slow."""
    index = index_of([{"x": f"v{n}"} for n in range(MAX_FACET_VALUES + 1)])
    with pytest.raises(InvalidInput, match="distinct values"):
        index.counts("x", BitMap([0]), 10)


@pytest.mark.parametrize(
    ("source", "share"),
    [
        ({"lang": "en"}, 0.25),
        ({"lang": {"$ne": "en"}}, 0.75),
        ({"n": {"$lt": 100}}, 0.1),
        ({"lang": "en", "n": {"$lt": 500}}, 0.125),
        ({"$or": [{"lang": "en"}, {"lang": "de"}]}, 0.4375),
        ({"lang": {"$exists": True}}, 1.0),
        ({"unknown": 1}, 0.0),
        ({"tags": {"$contains": "t3"}}, 0.1),
    ],
)
def test_an_estimate_is_near_what_is_true(source, share):
    """Counts and samples give the selectivity of a filter, taking its fields as independent."""
    languages = ["en", "de", "fr", "it"]
    documents = [{"lang": languages[n % 4], "n": n, "tags": [f"t{n % 10}"]} for n in range(1000)]
    index = index_of(documents)
    assert index.estimate(parse_filter(source), BitMap(range(1000))) == pytest.approx(1000 * share, abs=20)


def test_bytes_that_are_not_an_index_are_damage():
    """Whatever a file holds, it is read whole or refused."""
    frozen = index_of([{"x": "a", "n": 1}, {"x": "b", "n": 2.5}]).freeze()
    for wrong in (b"", b"\x00", frozen[:-3], b"\x80"):
        with pytest.raises(Damaged):
            AttributeIndex.load(wrong)
