"""Fusion and blending against numbers worked out by hand."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.search.fusion import Ranked, blend, bm25_ceiling, bm25_confidence, fuse, standardize
from services.search.ports import Candidate, LexicalStatistics


def candidate(id_: str, dense: float | None = None, bm25: float | None = None) -> Candidate:
    """Return a candidate with these scores."""
    return Candidate(id_, 0, 0, dense, bm25)


def ids(ranked: list[Ranked]) -> list[str]:
    """Return the order by id."""
    return [entry.candidate.id for entry in ranked]


def scores(ranked: list[Ranked]) -> dict[str, float]:
    """Return the scores by id."""
    return {entry.candidate.id: entry.score for entry in ranked}


def test_standardize_by_hand():
    """2, 4, 6 have mean 4 and deviation √(8/3)."""
    unit = 2 / math.sqrt(8 / 3)
    assert standardize([2, 4, 6]) == pytest.approx([-unit, 0, unit])


@pytest.mark.parametrize(("given_scores", "result"), [([], []), ([5.0], [0.0]), ([0.3] * 4, [0.0] * 4)])
def test_scores_that_do_not_differ_say_nothing(given_scores, result):
    """Equal scores are all zero, so the other retriever alone decides."""
    assert standardize(given_scores) == result


def test_standardized_fusion_by_hand():
    """0.6 of the dense z-score plus 0.4 of BM25's; a candidate without a BM25 score counts with the lowest one seen."""
    found = [candidate("a", 0.9, 2.0), candidate("b", 0.5, 8.0), candidate("c", 0.7, None)]
    # dense: mean 0.7, deviation √(0.08/3) = 0.16330; BM25 as 2, 8, 2: mean 4, deviation √8 = 2.82843
    expected = {
        "a": 0.6 * 1.224745 + 0.4 * -0.707107,
        "b": 0.6 * -1.224745 + 0.4 * 1.414214,
        "c": 0.6 * 0.0 + 0.4 * -0.707107,
    }
    ranked = fuse(found, method="standardized", dense_weight=0.6)
    assert ids(ranked) == ["a", "b", "c"]
    assert scores(ranked) == pytest.approx(expected, abs=1e-5)
    assert {entry.score_kind for entry in ranked} == {"fused"}
    assert all(entry.fused == entry.score for entry in ranked)


def test_the_weight_decides():
    """With all the weight on one retriever the order is that retriever's."""
    found = [candidate("a", 0.9, 1.0), candidate("b", 0.8, 3.0), candidate("c", 0.7, 2.0)]
    assert ids(fuse(found, method="standardized", dense_weight=1.0)) == ["a", "b", "c"]
    assert ids(fuse(found, method="standardized", dense_weight=0.0)) == ["b", "c", "a"]


def test_the_bm25_ceiling_by_hand():
    """Each word adds ln(1 + (N - n + 0.5) / (n + 0.5)) · 2.2, as often as it was asked; without statistics it is 0."""
    statistics = LexicalStatistics(10, {"rare": 1, "common": 9})
    rare, common, absent = math.log(1 + 9.5 / 1.5), math.log(1 + 1.5 / 9.5), math.log(1 + 10.5 / 0.5)
    assert bm25_ceiling(["rare", "common"], statistics) == pytest.approx(2.2 * (rare + common))
    assert bm25_ceiling(["rare", "rare", "absent"], statistics) == pytest.approx(2.2 * (2 * rare + absent))
    assert bm25_ceiling([], statistics) == bm25_ceiling(["rare"], None) == 0.0


def test_counts_that_lag_behind_break_no_ceiling():
    """Frequencies above the number of documents, as deletions leave them for a while, still give a finite ceiling."""
    assert 0 < bm25_ceiling(["word"], LexicalStatistics(3, {"word": 9})) < math.inf


def test_poor_word_matches_count_for_less():
    """BM25's part is scaled by how near its best score comes to the ceiling, never up."""
    found = [candidate("a", 0.9, 1.0), candidate("b", 0.5, 2.0)]
    for ceiling, share in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (4.0, 0.5), (20.0, 0.1)):
        ranked = fuse(found, method="standardized", dense_weight=0.4, ceiling=ceiling)
        expected = 0.4 - 0.6 * share
        assert scores(ranked) == pytest.approx({"a": expected, "b": -expected})
    assert ids(fuse(found, method="standardized", dense_weight=0.4)) == ["b", "a"]
    assert ids(fuse(found, method="standardized", dense_weight=0.4, ceiling=20.0)) == ["a", "b"]


def test_reciprocal_ranks_by_hand():
    """Each retriever gives 1 / (60 + rank); one that did not find a candidate gives it nothing."""
    found = [candidate("a", 0.9, None), candidate("b", 0.8, 5.0), candidate("c", 0.1, 9.0)]
    ranked = fuse(found, method="rrf", dense_weight=0.6)
    assert scores(ranked) == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 1 / 62, "c": 1 / 63 + 1 / 61})
    assert ids(ranked) == ["c", "b", "a"]


@pytest.mark.parametrize("method", ["standardized", "rrf"])
def test_one_retriever_alone_keeps_its_own_scores(method):
    """Where only one retriever ran, or found anything, its score is the order and is named as what it is."""
    lexical = fuse([candidate("a", None, 1.5), candidate("b", None, 2.5)], method=method, dense_weight=0.6)
    assert [(entry.candidate.id, entry.score, entry.score_kind) for entry in lexical] == [
        ("b", 2.5, "bm25"),
        ("a", 1.5, "bm25"),
    ]
    dense = fuse([candidate("a", -0.5), candidate("b", 0.4)], method=method, dense_weight=0.6)
    assert [(entry.candidate.id, entry.score, entry.score_kind) for entry in dense] == [
        ("b", 0.4, "dense"),
        ("a", -0.5, "dense"),
    ]


@pytest.mark.parametrize("method", ["standardized", "rrf"])
def test_nothing_found_is_nothing_ranked(method):
    """No candidates give an empty order."""
    assert fuse([], method=method, dense_weight=0.6) == []


@pytest.mark.parametrize("method", ["standardized", "rrf"])
def test_equal_scores_go_by_id(method):
    """Ties are broken by id, whatever order the shards answered in."""
    found = [candidate(id_, 0.5, 3.0) for id_ in "dacb"]
    assert ids(fuse(found, method=method, dense_weight=0.6)) == ["a", "b", "c", "d"]


def test_the_confidence_by_hand():
    """It is the best BM25 score's share of the ceiling, never above 1, and 1 where no ceiling is known."""
    found = [candidate("a", 0.9, 3.0), candidate("b", 0.8)]
    assert [bm25_confidence(found, ceiling) for ceiling in (0.0, 2.0, 12.0)] == [1.0, 1.0, 0.25]
    assert bm25_confidence([candidate("b", 0.8)], 12.0) == 0.0


@pytest.mark.parametrize("scores_of", [(-40.0, -900.0), (900.0, 40.0), (0.9, -0.5)], ids=["l2", "dot", "cosine"])
@pytest.mark.parametrize("bm25", [None, 3.0])
def test_a_missing_dense_score_is_never_the_best(scores_of, bm25):
    """Whatever range the metric has, a candidate without a dense score counts with the lowest one seen."""
    near, far = scores_of
    found = [candidate("far", far, bm25), candidate("near", near, bm25), candidate("none", None, bm25)]
    assert ids(fuse(found, method="standardized", dense_weight=0.6)) == ["near", "far", "none"]


def rows(values: list[tuple[int, int | None]]) -> list[Candidate]:
    """Return candidates with scores in quarters, so that scaling them loses little."""
    return [candidate(f"{n:02}", d / 4, None if b is None else b / 4) for n, (d, b) in enumerate(values)]


scored = st.lists(st.tuples(st.integers(-40, 40), st.none() | st.integers(0, 80)), min_size=2, max_size=25).map(rows)


@given(found=scored, scale=st.floats(0.05, 50), shift=st.floats(-20, 20), which=st.sampled_from(["dense", "bm25"]))
def test_the_order_does_not_depend_on_a_retrievers_scale(found, scale, shift, which):
    """Multiplying and shifting all of one retriever's scores changes no fused score, hence no order but of ties."""
    assume(any(one.bm25 is not None for one in found))

    def moved(score: float | None) -> float | None:
        return None if score is None else score * scale + shift

    other = [
        candidate(one.id, moved(one.dense), one.bm25)
        if which == "dense"
        else candidate(one.id, one.dense, moved(one.bm25))
        for one in found
    ]
    before = fuse(found, method="standardized", dense_weight=0.6)
    after = fuse(other, method="standardized", dense_weight=0.6)
    assert scores(after) == pytest.approx(scores(before), abs=1e-6)
    values = scores(before)
    order = [values[id_] for id_ in ids(after)]
    assert all(left >= right - 1e-6 for left, right in pairwise(order))


@given(found=scored, method=st.sampled_from(["standardized", "rrf"]), random=st.randoms())
def test_the_order_does_not_depend_on_the_order_given(found, method, random):
    """Which shard answers first changes nothing, and every candidate is ranked once."""
    shuffled = random.sample(found, len(found))
    assert ids(fuse(shuffled, method=method, dense_weight=0.6)) == ids(fuse(found, method=method, dense_weight=0.6))
    assert sorted(ids(fuse(found, method=method, dense_weight=0.6))) == [one.id for one in found]


def ranked_by(**fused: float) -> list[Ranked]:
    """Return entries in the order given, with these fused scores."""
    return [Ranked(candidate(id_), score, score, "fused") for id_, score in fused.items()]


def test_blend_by_hand():
    """Half of each z-score over the entries that were scored, and both raw scores kept."""
    last = blend(ranked_by(a=3.0, b=2.0, c=1.0), [0.1, 0.9, 0.5], weight=0.5)
    z = math.sqrt(1.5)
    assert ids(last) == ["b", "a", "c"]
    assert scores(last) == pytest.approx({"a": 0.0, "b": 0.5 * z, "c": -0.5 * z}, abs=1e-9)
    assert [(entry.rerank, entry.fused, entry.score_kind) for entry in last] == [
        (0.9, 2.0, "blended"),
        (0.1, 3.0, "blended"),
        (0.5, 1.0, "blended"),
    ]


def test_the_reranker_counts_by_log_odds():
    """Nine to one is as far from even as one to nine and half as far as 81 to 1; certainty is kept finite."""
    last = blend(ranked_by(a=0.0, b=0.0, c=0.0, d=0.0), [0.5, 0.1, 0.9, 81 / 82], weight=1.0)
    z = scores(last)
    assert z["c"] - z["a"] == pytest.approx(z["a"] - z["b"])
    assert z["d"] - z["a"] == pytest.approx(2 * (z["c"] - z["a"]))
    assert ids(blend(ranked_by(a=2.0, b=1.0, c=3.0), [1.0, 1.0, 0.0], weight=1.0)) == ["a", "b", "c"]


def test_the_blends_weight_decides():
    """With weight 1 the order is the reranker's, with 0 it is retrieval's."""
    entries = ranked_by(a=3.0, b=2.0, c=1.0)
    assert ids(blend(entries, [0.1, 0.5, 0.9], weight=1.0)) == ["c", "b", "a"]
    assert ids(blend(entries, [0.1, 0.5, 0.9], weight=0.0)) == ["a", "b", "c"]


def test_what_was_not_scored_follows_in_retrieval_order():
    """Entries without a score, in the middle or at the end, come after the scored ones with their retrieval score."""
    last = blend(ranked_by(a=5.0, b=4.0, c=3.0, d=2.0, e=1.0), [0.1, None, 0.9], weight=1.0)
    assert ids(last) == ["c", "a", "b", "d", "e"]
    assert [(entry.score, entry.score_kind, entry.rerank) for entry in last[2:]] == [
        (4.0, "fused", None),
        (2.0, "fused", None),
        (1.0, "fused", None),
    ]


def test_what_only_the_first_model_scored_follows():
    """Those are blended among themselves, whatever their scores, and end before the unscored; scores fall all the way."""
    entries = ranked_by(a=6.0, b=5.0, c=4.0, d=3.0, e=2.0, f=1.0)
    last = blend(entries, [0.1, 0.99, 0.9, 0.98, 0.2, None], weight=1.0, coarse={1, 3})
    assert ids(last) == ["c", "e", "a", "b", "d", "f"]
    reranked = [entry.score for entry in last[:5]]
    assert reranked == sorted(reranked, reverse=True)
    assert ids(blend(entries[:2], [0.1, 0.9], weight=1.0, coarse={0, 1})) == ["b", "a"]


def test_a_reranker_that_makes_no_difference_leaves_the_order():
    """Equal rerank scores decide nothing: the fused order stays."""
    assert ids(blend(ranked_by(a=3.0, b=2.0, c=1.0), [0.5, 0.5, 0.5], weight=0.5)) == ["a", "b", "c"]


def test_equal_blended_scores_go_by_id():
    """Ties of the last order are broken by id too."""
    assert ids(blend(ranked_by(b=1.0, a=1.0), [0.5, 0.5], weight=0.5)) == ["a", "b"]


def test_scores_that_differ_by_rounding_alone_are_equal():
    """Shards score in float32: a tie in BM25 that differs in its last place must not outweigh the dense scores."""
    assert standardize([0.875469, 0.875469 * (1 + 1e-7), 0.875469]) == [0.0, 0.0, 0.0]
    found = [
        Candidate("a", 0, 0, 1.0, 0.875469),
        Candidate("c", 1, 0, 0.7071, 0.875469 * (1 + 1e-7)),
        Candidate("b", 2, 0, 0.0, None),
    ]
    assert ids(fuse(found, method="standardized", dense_weight=0.65)) == ["a", "c", "b"]
