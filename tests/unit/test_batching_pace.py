"""How fast the machine is just now: predictions follow it within a few batches, whatever sizes batches have."""

import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.batching import BatchObservation, CostModel, Lane
from services.common.deadline import NO_DEADLINE
from tests.batching_engine import Echo, occupy, running, until

SIZES = [(items, tokens) for items in (1, 4, 16, 64) for tokens in (8, 32, 128, 256)]


def seconds(items: int, tokens: int) -> float:
    """Return what the machine takes when nobody else uses it."""
    return 0.003 + items * tokens * (1.4e-4 + 1e-7 * tokens)


def measured() -> CostModel:
    """Return a cost model that was calibrated on this machine."""
    cost = CostModel()
    cost.calibrate([(*size, seconds(*size)) for size in SIZES])
    return cost


def observe(cost: CostModel, sizes: list[tuple[int, int]], factor: float = 1.0) -> None:
    """Have it learn of batches that took *factor* times as long."""
    for size in sizes:
        cost.observe(*size, factor * seconds(*size))


@pytest.mark.parametrize(("factor", "batches"), [(2.0, 2), (3.0, 3), (4.0, 4), (0.5, 2), (0.25, 4)])
def test_another_pace_is_known_after_a_few_batches(factor, batches):
    """A machine that is suddenly slower, or quicker, is predicted within 1.5 times after so few batches, at all sizes."""
    cost = measured()
    observe(cost, [(8, 128)] * 50)
    observe(cost, [(8, 128)] * batches, factor)
    for size in ((8, 128), (1, 128), (16, 32), (4, 256)):
        assert 1 / 1.5 <= cost.predict_s(*size) / (factor * seconds(*size)) <= 1.5


@given(
    seed=st.integers(0, 1 << 32),
    factor=st.floats(0.4, 2.5),
    sizes=st.sampled_from([[(8, 128)], SIZES, [(1, 8), (1, 8), (1, 8), (16, 128)], [(1, 8), (64, 256)]]),
)
def test_it_stays_right_about_all_sizes(seed, factor, sizes):
    """Long after the change each size is predicted within 1.5 times, whichever sizes the batches had, noise included."""
    random = Random(seed)
    cost = measured()
    for pace in (1.0, factor):
        for _ in range(60):
            size = random.choice(sizes)
            cost.observe(*size, pace * seconds(*size) * random.uniform(0.95, 1.05))
    for size in ((1, 8), (1, 128), (16, 128), (64, 256)):
        assert 1 / 1.5 <= cost.predict_s(*size) / (factor * seconds(*size)) <= 1.5


def test_short_batches_say_little_about_long_ones():
    """Batches of one short text that take thrice what was measured do not have long ones predicted so."""
    cost = measured()
    random = Random(3)
    for _ in range(200):
        if random.random() < 0.7:
            cost.observe(1, 2, 3 * seconds(1, 2))
        else:
            cost.observe(12, 128, seconds(12, 128))
    assert cost.predict_s(12, 128) == pytest.approx(seconds(12, 128), rel=0.25)
    assert cost.predict_s(1, 2) == pytest.approx(3 * seconds(1, 2), rel=0.25)


def test_noise_does_not_carry_it_away():
    """Batches that take a third longer on average, now and then thrice as long, are predicted as about that."""
    cost = measured()
    random = Random(4)
    predicted = []
    for _ in range(400):
        cost.observe(6, 128, seconds(6, 128) * (1 + random.expovariate(3)))
        predicted.append(cost.predict_s(6, 128) / seconds(6, 128))
    assert 1 <= min(predicted[40:]) <= max(predicted[40:]) <= 2
    assert 1.15 <= sum(predicted[40:]) / len(predicted[40:]) <= 1.45


def test_waiting_work_and_what_people_read_have_the_pace():
    """What queued work should take, and the figures shown, are those of now; a batch's budget depends on their ratio alone."""
    cost = measured()
    before_s, described, budget = cost.work_s(10, 1000, 100_000, 500), cost.as_dict(), cost.budget_tokens(2048)
    observe(cost, [(8, 128)] * 60, 2.0)
    assert cost.work_s(10, 1000, 100_000, 500) == pytest.approx(2 * before_s, rel=0.1)
    assert cost.as_dict()["ms_per_1000_tokens"] == pytest.approx(2 * described["ms_per_1000_tokens"], rel=0.1)
    assert cost.budget_tokens(2048) == pytest.approx(budget, rel=0.1)


@pytest.mark.parametrize(("pads", "items"), [(True, 11), (False, 2)])
async def test_items_that_do_not_pad_each_other_are_counted_by_their_sum(pads, items):
    """Ten short items beside a long one are learnt and reported as what they amount to, where the engine says so."""
    engine = Echo()
    engine.pads = pads
    async with running(engine) as batcher:
        seen: list[BatchObservation] = []
        learnt: list[tuple[int, int]] = []
        batcher.observe = seen.append
        batcher.cost.observe = lambda items, longest, _seconds: learnt.append((items, longest))
        busy = await occupy(batcher, engine)
        asked = [*(f"{number}x" for number in range(10)), "x" * 100]
        both = asyncio.create_task(batcher.submit(asked, lane=Lane.QUERY, deadline=NO_DEADLINE))
        await until(lambda: len(engine.queued) == 12)
        engine.gate.set()
        await asyncio.gather(busy, both)
        await until(lambda: len(seen) == 2)
    assert learnt == [(1, 4), (items, 100)]
    assert (seen[1].items, seen[1].tokens, seen[1].padded_tokens) == (11, 120, items * 100)
