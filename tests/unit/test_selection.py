"""Thresholds, groups and diversity: by hand, and what holds for any candidates."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.search.fusion import Ranked
from services.search.ports import Candidate
from services.search.selection import at_least, diversify, first_of_each, group_key, head


def entry(id_: str, score: float, *, bm25: float | None = None, rerank: float | None = None) -> Ranked:
    """Return an entry with this fused and dense score."""
    return Ranked(Candidate(id_, 0, 0, score, bm25), score, score, "fused", rerank)


def ids(ranked: list[Ranked]) -> list[str]:
    """Return the order by id."""
    return [one.candidate.id for one in ranked]


# --- thresholds


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("dense", 0.5, ["a", "b"]),
        ("fused", 0.6, ["a"]),
        ("bm25", 2.0, ["b"]),
        ("bm25", 0.0, ["b"]),
        ("rerank", 0.3, ["a"]),
        ("dense", -9.0, ["a", "b", "c"]),
    ],
)
def test_a_threshold_is_on_one_stages_score(kind, value, kept):
    """What is at the value stays, what is below it goes, and so does what the stage has no score for."""
    ranked = [entry("a", 0.9, rerank=0.3), entry("b", 0.5, bm25=2.0, rerank=0.1), entry("c", 0.1)]
    assert ids(at_least(ranked, kind, value)) == kept


# --- groups


def test_what_is_one_group():
    """Equal values are one group; numbers, booleans and strings never meet; a list is one value, in its order."""
    values = [1, 1.0, True, "1", "true", ["a", "b"], ["b", "a"], ["a"], "a"]
    keys = [group_key("x", {"f": value}, "f") for value in values]
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(values) - 1
    assert group_key("x", {"f": ["a", "b"]}, "f") == group_key("y", {"f": ["a", "b"]}, "f")


def test_without_the_field_each_is_its_own_group():
    """Documents without the field do not fold into one."""
    assert group_key("x", {}, "f") != group_key("y", {}, "f")


groups = st.lists(st.tuples(st.integers(0, 5), st.integers(-20, 20)), max_size=30)


@given(found=groups)
def test_one_hit_per_group_and_the_best(found):
    """Of each value exactly the first entry stays, and the order of what stays is that of the scores."""
    ranked = sorted((entry(f"{n:02}", score / 4) for n, (_, score) in enumerate(found)), key=lambda one: -one.score)
    group = {f"{n:02}": value for n, (value, _) in enumerate(found)}
    kept = list(first_of_each((one, ("number", group[one.candidate.id])) for one in ranked))
    assert sorted(group[id_] for id_ in ids(kept)) == sorted(set(group.values()))
    assert all(left.score >= right.score for left, right in pairwise(kept))
    for one in kept:
        assert one.score == max(other.score for other in ranked if group[other.candidate.id] == group[one.candidate.id])


# --- diversity


def test_diversity_by_hand():
    """a and b say the same and c something else: at one half c is second, since b adds nothing to a."""
    ranked = [entry("a", 1.0), entry("b", 0.9), entry("c", 0.5), entry("d", 0.0)]
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    # after a: b .5·.9 − .5·1 = −.05, c .5·.5 − 0 = .25, d 0 − .5·.6 = −.3; after c: b −.05, d −.5·.8 = −.4
    assert ids(diversify(ranked, vectors, 0.5, limit=4)) == ["a", "c", "b", "d"]


def test_diversity_asks_for_direction_not_for_length():
    """Vectors are compared by cosine whatever the collection's metric is."""
    ranked = [entry("a", 1.0), entry("b", 0.9), entry("c", 0.5)]
    vectors = np.array([[1, 0], [9, 0], [0, 0.1]], dtype=np.float32)
    assert ids(diversify(ranked, vectors, 0.5, limit=3)) == ["a", "c", "b"]


def test_what_is_not_chosen_follows_in_its_order():
    """With a limit only the first places are given by diversity."""
    ranked = [entry("a", 1.0), entry("b", 0.9), entry("c", 0.5), entry("d", 0.4)]
    vectors = np.array([[1, 0], [1, 0], [0.9, 0.1], [0, 1]], dtype=np.float32)
    assert ids(diversify(ranked, vectors, 0.9, limit=2)) == ["a", "d", "b", "c"]


def test_the_head_is_of_one_kind():
    """Scores of two kinds do not compare, so diversity stops where the kind changes."""
    ranked = [Ranked(entry("a", 1.0).candidate, 1.0, 1.0, "blended"), entry("b", 3.0), entry("c", 2.0)]
    assert (head(ranked, 9), head(ranked[1:], 9), head(ranked[1:], 1), head([], 9)) == (1, 2, 1, 0)


spread = st.lists(st.tuples(st.integers(-20, 20), st.tuples(*[st.integers(-3, 3)] * 3)), min_size=1, max_size=25).map(
    lambda found: sorted(found, key=lambda one: -one[0])
)


@given(found=spread)
def test_no_diversity_keeps_the_order(found):
    """0 is the order of relevance."""
    ranked = [entry(f"{n:02}", score) for n, (score, _) in enumerate(found)]
    vectors = np.array([vector for _, vector in found], dtype=np.float32)
    assert diversify(ranked, vectors, 0.0, limit=len(ranked)) == ranked


@given(found=spread, diversity=st.floats(0, 1), limit=st.integers(1, 30))
def test_diversity_changes_places_and_nothing_else(found, diversity, limit):
    """Every entry stays, once; one of the best is first; and a longer limit does not change the places before it."""
    ranked = [entry(f"{n:02}", score) for n, (score, _) in enumerate(found)]
    vectors = np.array([vector for _, vector in found], dtype=np.float32)
    made = diversify(ranked, vectors, diversity, limit=limit)
    assert sorted(ids(made)) == ids(ranked)
    assert made[0] == ranked[0]
    assert ids(diversify(ranked, vectors, diversity, limit=len(ranked)))[:limit] == ids(made)[:limit]


@given(found=spread, diversity=st.floats(0.01, 1))
def test_equal_vectors_leave_the_order(found, diversity):
    """Where all say the same there is nothing to gain: relevance decides, down to full diversity, where ties keep it."""
    ranked = [entry(f"{n:02}", score) for n, (score, _) in enumerate(found)]
    vectors = np.ones((len(found), 3), dtype=np.float32)
    assert diversify(ranked, vectors, diversity, limit=len(ranked)) == ranked
