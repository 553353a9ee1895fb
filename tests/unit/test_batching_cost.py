"""What the batcher expects a batch to take: what it learns from, and what follows."""

from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.batching import CostModel

GRID = [(items, tokens) for items in (1, 4, 16, 64) for tokens in (8, 32, 128, 256)]


def seconds(items: int, tokens: int, constant: float, linear: float, attention: float) -> float:
    """Return what a machine with these coefficients takes."""
    return constant + items * tokens * (linear + attention * tokens)


def measured(constant: float, linear: float, attention: float) -> CostModel:
    """Return a cost model that was calibrated on such a machine."""
    cost = CostModel()
    cost.calibrate([(*size, seconds(*size, constant, linear, attention)) for size in GRID])
    return cost


@given(constant=st.floats(1e-4, 1e-2), linear=st.floats(1e-7, 1e-3), attention=st.floats(0, 1e-7))
def test_a_calibrated_model_predicts_the_machine(constant, linear, attention):
    """Any machine that the formula describes is found from the grid, sizes between included."""
    cost = measured(constant, linear, attention)
    assert cost.ready
    for items, tokens in [*GRID, (7, 50), (100, 16)]:
        assert cost.predict_s(items, tokens) == pytest.approx(
            seconds(items, tokens, constant, linear, attention), rel=0.01
        )


@given(samples=st.lists(st.tuples(st.integers(1, 128), st.integers(0, 512), st.floats(0, 10)), min_size=1, max_size=60))
def test_predictions_are_never_negative_and_grow_with_size(samples):
    """Whatever was measured, a larger batch is never expected to take less time."""
    cost = CostModel()
    cost.calibrate(samples[:1])
    for sample in samples:
        cost.observe(*sample)
    predictions = [cost.predict_s(items, 32) for items in (1, 8, 64)]
    assert 0 <= predictions[0] <= predictions[1] <= predictions[2]
    assert 1 <= cost.budget_tokens(2048) <= 2048


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_it_follows_a_machine_that_changes_its_pace(factor):
    """After a few dozen batches, of one size only, predictions for other sizes have the new pace too."""
    coefficients = (0.001, 3e-5, 1e-8)
    cost = measured(*coefficients)
    for _ in range(120):
        cost.observe(16, 128, factor * seconds(16, 128, *coefficients))
    for size in ((16, 128), (1, 8), (4, 256)):
        assert cost.predict_s(*size) == pytest.approx(factor * seconds(*size, *coefficients), rel=0.15)


def test_it_learns_without_calibration():
    """A machine a hundred times faster than assumed is known after some batches, and then predictions are ready."""
    cost = CostModel()
    for number in range(60):
        assert cost.ready == (number >= 20)
        size = GRID[number % len(GRID)]
        cost.observe(*size, seconds(*size, 1e-4, 2e-6, 0.0))
    assert cost.predict_s(16, 128) == pytest.approx(seconds(16, 128, 1e-4, 2e-6, 0.0), rel=0.1)


def test_one_stall_hardly_counts():
    """A batch that took a hundred times as long, once, does not double predictions."""
    coefficients = (0.001, 3e-5, 0.0)
    cost = measured(*coefficients)
    for number in range(50):
        cost.observe(8, 64, (100 if number == 40 else 1) * seconds(8, 64, *coefficients))
    assert cost.predict_s(8, 64) < 2 * seconds(8, 64, *coefficients)


def test_the_budget_is_the_least_with_nearly_the_best_throughput():
    """The budget's throughput is within 2 % of the largest batch's, a quarter less of it would not be, and it never is tiny."""
    constant, linear = 0.01, 3e-5
    cost = measured(constant, linear, 0.0)
    most = 16_384

    def throughput(tokens: float) -> float:
        return tokens / (constant + 0.0003 + linear * tokens)

    budget = cost.budget_tokens(most)
    assert budget < 0.6 * most
    assert throughput(budget) >= 0.979 * throughput(most)
    assert throughput(0.75 * budget) < 0.98 * throughput(most)
    assert 0.95 * 128 <= cost.budget_tokens(128) <= 128
    assert measured(0.0, linear, 0.0).budget_tokens(most) == most / 4
    assert CostModel().budget_tokens(most) == most


def test_products_that_grow_more_efficient_with_size_ask_for_larger_batches():
    """A single item shows little of what a batch costs where it is the processor that is used better and better."""

    def efficient(items: int, tokens: int) -> float:
        return 35e-6 * items * tokens + 0.007 * (1 - exp(-items * tokens / 300))

    cost = CostModel()
    sizes = [(items, tokens) for tokens in (8, 32, 128, 256) for items in (1, 512 // tokens, 2048 // tokens)]
    cost.calibrate([(*size, efficient(*size)) for size in sizes])
    budget = cost.budget_tokens(2048)
    best = 2048 / (efficient(16, 128) + 0.0003)
    assert 1500 <= budget <= 1850
    assert budget / (efficient(budget, 1) + 0.0003) >= 0.97 * best


def test_waiting_work_is_summed_up():
    """The time for what waits counts a constant for each batch and the work by tokens and by their squares."""
    cost = measured(0.01, 1e-4, 1e-6)
    assert cost.work_s(0, 0, 0, 100) == 0
    expected = 3 * 0.01 + 250 * 1e-4 + 20_000 * 1e-6
    assert cost.work_s(5, 250, 20_000, 100) == pytest.approx(expected, rel=0.01)


def test_it_describes_itself():
    """What people read is in milliseconds, and says whether it was measured."""
    described = measured(0.002, 3e-5, 1e-8).as_dict()
    assert described["ready"] is True
    assert described["batch_ms"] == pytest.approx(2, rel=0.01)
    assert described["ms_per_1000_tokens"] == pytest.approx(30, rel=0.01)
    assert described["attention_ms_per_1000_tokens_of_length_100"] == pytest.approx(1, rel=0.01)
