"""How a search's time is split over its stages, and how many candidates there is time to rerank."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.search.budget import CALL_PAIRS, FEW_PAIRS, PRIOR_PAIR_S, Budget, Usual


def measured(times: int = 20, *, pair_s: float | None = None, patience_s: float = 1.0, **stages: float) -> Budget:
    """Return a budget whose stages took so long each time."""
    budget = Budget(patience_s=patience_s)
    for _ in range(times):
        for stage, seconds in stages.items():
            budget.note(stage, seconds)
        if pair_s is not None:
            budget.note_reranked(30, pair_s * (30 + CALL_PAIRS))
    return budget


def test_what_is_usual_is_the_95th_percentile_of_the_latest():
    """A slow one in twenty counts, one in a hundred does not, and what was long ago is forgotten."""
    usual = Usual(0.5)
    assert usual.seconds == 0.5
    for number in range(64):
        usual.note(0.2 if number % 10 == 0 else 0.1)
    assert usual.seconds == 0.2
    for number in range(64):
        usual.note(0.2 if number == 30 else 0.1)
    assert usual.seconds == 0.1


def test_being_late_doubles_what_is_usual_until_it_is_in_time_again():
    """A stage that became slow is given more, up to sixteenfold; each time in time halves that."""
    usual = Usual(0.1)
    for _ in range(10):
        usual.note_late(60.0)
    assert usual.seconds == pytest.approx(1.6)
    for _ in range(4):
        usual.note(0.1)
    assert usual.seconds == pytest.approx(0.1)


def test_being_late_in_too_short_a_time_says_nothing():
    """A caller in a hurry does not make a stage look slow."""
    usual = Usual(0.1)
    usual.note_late(0.05)
    assert usual.seconds == 0.1


def test_time_is_split_in_proportion():
    """Each stage has slack as those after it have; reranking counts with a few pairs."""
    budget = measured(embed=0.01, retrieve=0.02, hits=0.01, patience_s=60.0)
    assert budget.allowed_s("embed", 4.0, rerank=False) == pytest.approx(1.0)
    assert budget.allowed_s("retrieve", 3.0, rerank=False) == pytest.approx(2.0)
    budget = measured(embed=0.01, retrieve=0.02, hits=0.01, pair_s=0.06 / (CALL_PAIRS + FEW_PAIRS), patience_s=60.0)
    assert budget.allowed_s("embed", 4.0, rerank=True) == pytest.approx(0.4)


def test_retrieval_has_half_of_what_is_left_at_least():
    """Without shards there is no answer, so that they are not hurried for the sake of what comes after them."""
    budget = measured(embed=0.01, retrieve=0.01, hits=0.001, pair_s=0.1)
    assert budget.allowed_s("retrieve", 2.0, rerank=True) == pytest.approx(1.0)


def test_the_step_down_has_its_time():
    """Embedding may use no time that retrieval and hits usually take; where there is only that, it has none."""
    budget = measured(embed=0.1, retrieve=0.04, hits=0.01)
    assert budget.allowed_s("embed", 0.1, rerank=False) == pytest.approx(0.05)
    assert budget.allowed_s("embed", 0.05, rerank=False) == 0.0
    assert budget.allowed_s("embed", -1.0, rerank=True) == 0.0


def test_a_vector_is_waited_for_with_ease():
    """
    Where retrieval takes long a proportional share would be short.

    Ten times the usual is given, a quarter of a second at least, but no more than a quarter of the time, nor what
    retrieval needs.
    """
    budget = measured(embed=0.02, retrieve=0.5, hits=0.01)
    assert budget.allowed_s("embed", 2.0, rerank=False) == pytest.approx(0.25)
    assert budget.allowed_s("embed", 0.8, rerank=False) == pytest.approx(0.2)
    assert budget.allowed_s("embed", 0.61, rerank=False) == pytest.approx(0.1)
    assert measured(embed=0.04, retrieve=0.5, hits=0.01).allowed_s("embed", 2.0, rerank=False) == pytest.approx(0.4)


def test_shards_that_are_late_take_nothing_from_the_embedding():
    """A shard that hangs makes retrieval late again and again; the question is still embedded as ever."""
    budget = measured(embed=0.01, retrieve=0.02, hits=0.01)
    before_s = budget.allowed_s("embed", 0.1, rerank=False)
    for _ in range(10):
        budget.note_late("retrieve", 60.0)
    assert budget.allowed_s("embed", 0.1, rerank=False) == before_s
    assert budget.allowed_s("retrieve", 0.1, rerank=False) == pytest.approx(0.075)
    assert budget.allowed_s("retrieve", 2.0, rerank=False) == pytest.approx(1.84)


def test_a_stuck_embedding_is_not_waited_for_as_long_as_there_is_time():
    """Of a long time only the patience is used, or ten times what is usual where that is more."""
    assert measured(embed=0.01, retrieve=0.01).allowed_s("embed", 60.0, rerank=False) == 1.0
    assert measured(embed=0.5, retrieve=0.01).allowed_s("embed", 60.0, rerank=False) == pytest.approx(5.0)


@given(
    remaining_s=st.floats(-1, 100),
    embed=st.floats(1e-4, 10),
    retrieve=st.floats(1e-4, 10),
    hits=st.floats(1e-4, 1),
    rerank=st.booleans(),
)
def test_no_stage_is_allowed_more_than_is_left(remaining_s, embed, retrieve, hits, rerank):
    """Whatever was measured: never negative, never over the time left, and something for retrieval while there is any."""
    budget = measured(8, embed=embed, retrieve=retrieve, hits=hits)
    for stage in ("embed", "retrieve"):  # Hits have what is left; nobody asks for their share.
        allowed_s = budget.allowed_s(stage, remaining_s, rerank=rerank)
        assert 0.0 <= allowed_s <= max(0.0, remaining_s) * (1 + 1e-9)
    if remaining_s > 0:
        assert budget.allowed_s("retrieve", remaining_s, rerank=rerank) > 0


def test_rerank_gets_as_many_as_its_cost_per_pair_affords():
    """The time left but for the hits, over the measured cost of a pair; half the time is for less than half as many."""
    budget = measured(pair_s=0.01, hits=0.005)
    assert budget.affordable(0.01 + (30 + CALL_PAIRS) * 0.01 + 1e-6) == 30
    assert budget.affordable(0.01 + (10 + CALL_PAIRS) * 0.01 + 1e-6) == 10


def test_one_candidate_is_tried_while_there_is_time_at_all():
    """A cost that was measured too high is found out so; with nothing left but for the hits none is."""
    budget = measured(pair_s=10.0, hits=0.005)
    assert budget.affordable(0.05) == 1
    assert budget.affordable(0.01) == 0


def test_a_reranker_that_was_late_is_asked_for_fewer():
    """Each time it scored nothing halves what it is asked for; scores bring it back."""
    budget = Budget()
    left_s = 0.01 + 34 * PRIOR_PAIR_S + 1e-6
    assert budget.affordable(left_s) == 30
    budget.note_rerank_late(30, 34 * PRIOR_PAIR_S)
    assert budget.affordable(left_s) == 13
    budget.note_reranked(13, 17 * PRIOR_PAIR_S)
    assert budget.affordable(left_s) == 30


def test_reranking_leaves_time_for_the_hits():
    """Whatever it is given ends before the deadline; of a long time it gets its patience."""
    budget = measured(hits=0.02, pair_s=0.001)
    assert budget.rerank_s(30, 0.5) == pytest.approx(0.46)
    assert budget.rerank_s(30, 60.0) == 1.0
    assert budget.rerank_s(30, 0.01) == 0.0


def test_without_a_deadline_all_are_affordable():
    """A caller that waits for ever gets everything, and stages that may be done without still end."""
    budget = Budget()
    assert budget.affordable(math.inf) >= 1000
    assert budget.allowed_s("retrieve", math.inf, rerank=True) == math.inf
    assert budget.allowed_s("embed", math.inf, rerank=True) < math.inf
