"""What a router reads of what a shard node, or whoever answers in its place, sends."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import ormsgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import DependencyUnavailable
from services.search.ports import (
    AuditReport,
    Candidate,
    LexicalStatistics,
    Match,
    ShardAnswer,
    ShardDocument,
    ShardStanding,
)
from services.search.shards import messages

ANSWER = ShardAnswer(
    3,
    17,
    [Candidate("a", 3, 0, 0.5, None), Candidate("b", 3, 9, None, 2.5)],
    {"dense": 0.25},
    {"filter": {"matched": 2}},
    {"lang": {"en": 2}},
    catching_up=True,
    lexical_failed=True,
)
READERS: list[Callable[[Any], object]] = [
    messages.statistics_in,
    messages.answer_in,
    messages.documents_in,
    messages.matches_in,
    messages.standings_in,
    messages.report_in,
]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


def travelled(value: object) -> Any:
    return messages.unpack_answer(messages.pack(value), "node")


def test_answers_travel_whole() -> None:
    """Every field of what a shard says arrives as it was."""
    assert messages.answer_in(travelled(messages.answer_out(ANSWER))) == ANSWER
    statistics = LexicalStatistics(5, {"red": 2})
    assert messages.statistics_in(travelled(messages.statistics_out(statistics))) == statistics
    document = ShardDocument("a", "text", None, {"year": 1999, "tags": ["x"]}, np.ones(3, np.float32), 4)
    found = messages.documents_in(travelled(messages.documents_out({"a": document})))["a"]
    assert (found.id, found.text, found.title, found.metadata, found.seq) == ("a", "text", None, document.metadata, 4)
    assert found.vector is not None
    assert found.vector.tolist() == [1, 1, 1]
    matches = [Match("a", 1), Match("b", 2)]
    assert messages.matches_in(travelled(messages.matches_out(matches))) == matches
    standings = [ShardStanding(0, 5, 3, segments={"flat": 3})]
    assert messages.standings_in(travelled(messages.standings_out(standings))) == standings
    report = AuditReport(0, 5, 3, {"missing": ["a"]}, 1)
    assert messages.report_in(travelled(messages.report_out(report))) == report


@pytest.mark.parametrize("reader", READERS)
@given(found=anything)
def test_rubbish_is_as_if_nobody_had_answered(reader, found) -> None:
    """Whatever comes, it is read or it raises the error of a node that does not answer."""
    with contextlib.suppress(DependencyUnavailable):
        reader(found)


@pytest.mark.parametrize("field", sorted(messages.answer_out(ANSWER)))
@given(value=anything)
def test_one_wrong_field_spoils_an_answer(field, value) -> None:
    """An answer that is read can be merged with others: no field of it is of a wrong type."""
    try:
        answer = messages.answer_in({**messages.answer_out(ANSWER), field: value})
    except DependencyUnavailable:
        return
    assert messages.answer_in(travelled(messages.answer_out(answer))) == answer


@given(st.binary(max_size=40))
def test_bytes_that_are_no_messagepack_name_the_node(content) -> None:
    """The error says who sent them."""
    try:
        ormsgpack.unpackb(content)
    except ValueError:
        with pytest.raises(DependencyUnavailable, match="node"):
            messages.unpack_answer(content, "node")
