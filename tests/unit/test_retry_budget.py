"""The retry budget, on a clock that the test moves."""

from services.common.retry_budget import RetryBudget
from tests.virtual_time import Clock


def taken(budget: RetryBudget, tries: int) -> int:
    """Return how many of *tries* extra calls were allowed."""
    return sum(budget.take() for _ in range(tries))


def test_extra_calls_are_a_share_of_the_first_attempts() -> None:
    """Where everything fails, a tenth of the calls is made again, beyond those that the bucket held at first."""
    clock = Clock()
    budget = RetryBudget(0.1, min_per_s=1.0, burst=10.0, clock=clock)
    extra = 0
    for _ in range(10_000):
        clock.now += 0.001
        budget.first()
        extra += budget.take()
    assert 1000 <= extra <= 1010


def test_few_calls_may_be_repeated_all_the_same() -> None:
    """With hardly any first attempts a few extra calls a second are allowed, and no more come at once than the burst."""
    clock = Clock()
    budget = RetryBudget(0.1, min_per_s=2.0, burst=5.0, clock=clock)
    assert taken(budget, 20) == 5
    clock.now += 1.0
    assert taken(budget, 20) == 2
    clock.now += 3600.0
    assert taken(budget, 20) == 5


def test_it_tells_what_it_was_asked() -> None:
    """Both answers are heard of, for the metrics."""
    heard: list[bool] = []
    budget = RetryBudget(burst=1.0, on_take=heard.append, clock=Clock())
    budget.take()
    budget.take()
    assert heard == [True, False]
