"""Batches where not all can be done in time: what is computed is in time, little time is lost, and everybody gets some."""

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.batching import CostModel
from services.common.batching.queue import Entry, Flow, Lane, LaneQueues
from services.common.batching.urgency import SLACK, in_time
from services.common.deadline import Deadline
from tests.batching_engine import Echo, occupy, running, until
from tests.virtual_time import Clock

FOREVER = float("inf")


def seconds(items: int, longest: int) -> float:
    """Return what the machine takes: a small encoder on a processor, some 55 entries of 128 tokens a second."""
    return 0.003 + 0.00014 * items * longest


def queue_of(*entries: tuple[int, float], clock: Clock, caller: str = "", **bounds: int) -> LaneQueues:
    """Return queues in which one submission of such (tokens, seconds to its deadline) waits."""
    limits = {"max_batch_tokens": 2048, "max_batch_items": 128, "sort_window": 32, **bounds}
    queues = LaneQueues(clock=clock, **limits)
    put(queues, *entries, clock=clock, caller=caller)
    return queues


def put(queues: LaneQueues, *entries: tuple[int, float], clock: Clock, caller: str = "") -> list[Entry]:
    """Queue one submission, its entries named by their positions."""
    flow = Flow(Lane.QUERY, caller)
    made = [
        Entry(position, tokens, clock.now + left_s if left_s < FOREVER else FOREVER)
        for position, (tokens, left_s) in enumerate(entries)
    ]
    for entry in made:
        queues.add(flow, entry)
    return made


@given(
    waiting=st.lists(
        st.tuples(st.integers(1, 300), st.one_of(st.floats(0.001, 2), st.just(FOREVER))), min_size=1, max_size=80
    ),
    most_tokens=st.integers(1, 4000),
    most_items=st.integers(1, 20),
)
def test_everything_runs_in_time_or_alone_and_each_entry_once(waiting, most_tokens, most_items):
    """Whatever waits: a batch ends before all its deadlines, or is one entry; it is within its bounds; none is left."""
    clock = Clock()
    queues = queue_of(*waiting, clock=clock, max_batch_tokens=most_tokens, max_batch_items=most_items)
    run: list[Entry] = []
    while len(queues):
        _, batch = queues.next_batch(predict=seconds)
        if not batch:
            break
        longest = batch[-1].tokens
        end = clock.now + seconds(len(batch), longest)
        assert len(batch) == 1 or end < min(entry.deadline_at for entry in batch)
        assert len(batch) <= most_items
        assert len(batch) == 1 or len(batch) * longest <= most_tokens
        assert [entry.tokens for entry in batch] == sorted(entry.tokens for entry in batch)
        run += batch
        clock.now = end
    assert len(run) == len(set(run))
    assert {entry.prepared for entry in run} >= {place for place, one in enumerate(waiting) if one[1] == FOREVER}


def test_where_there_is_time_batches_are_as_they_were():
    """With deadlines that the whole window can keep, what the batch should take changes nothing."""
    random = Random(5)
    waiting = [(random.randint(5, 250), 3600.0) for _ in range(200)]
    clock = Clock()
    one, other = (queue_of(*waiting, clock=clock) for _ in range(2))
    while len(one):
        expected = [entry.prepared for entry in one.next_batch()[1]]
        assert [entry.prepared for entry in other.next_batch(predict=seconds)[1]] == expected


def test_a_smaller_batch_of_the_first_in_time():
    """One submission without time for a full batch has its first entries computed, in several batches, all in time."""
    clock = Clock()
    queues = queue_of(*[(128, 0.3)] * 128, clock=clock)
    done: list[int] = []
    while True:
        _, batch = queues.next_batch(predict=seconds)
        if not batch:
            break
        clock.now += seconds(len(batch), 128)
        if clock.now <= batch[0].deadline_at:
            done += [entry.prepared for entry in batch]
    assert done == list(range(len(done)))
    assert len(done) >= 0.8 * 0.3 / seconds(1, 128)


def test_time_goes_to_what_can_still_be_in_time():
    """Entries that would be late at the end of the batch give place to those that would not, though they came first."""
    clock = Clock()
    queues = queue_of(*[(128, 0.05)] * 16, clock=clock)
    later = put(queues, *[(128, 2.0)] * 32, clock=clock)
    _, batch = queues.next_batch(predict=seconds)
    assert batch
    assert set(batch) <= set(later)


def test_what_cannot_be_in_time_is_tried_alone():
    """If by the prediction everything is late, one entry goes, which may prove it wrong; so nothing waits for nothing."""
    clock = Clock()
    queues = queue_of(*[(128, 0.01)] * 3, clock=clock)
    assert [len(queues.next_batch(predict=seconds)[1]) for _ in range(4)] == [1, 1, 1, 0]


def test_what_has_no_deadline_is_not_starved():
    """Submissions that come and go with deadlines that cannot be kept leave one without a deadline its turns."""
    clock = Clock()
    queues = queue_of(*[(128, FOREVER)] * 20, clock=clock)
    random = Random(7)
    got = 0
    for _ in range(120):
        put(queues, *[(128, random.uniform(0.2, 0.6))] * 20, clock=clock)
        _, batch = queues.next_batch(predict=seconds)
        clock.now += seconds(len(batch), batch[-1].tokens)
        got += sum(entry.deadline_at == FOREVER for entry in batch)
    assert got == 20


def test_lengths_are_not_mixed_for_their_turn():
    """An entry that would mostly add padding waits for a batch of its own kind."""
    clock = Clock()
    entries = [Entry(n, tokens, clock.now + 0.4) for n, tokens in enumerate([100, 10, 250, 105, 12, 98])]
    batch = in_time(entries, clock.now, most_s=1.0, predict=seconds, fits=lambda _items, _longest: True, max_items=8)
    assert [entry.tokens for entry in batch] == [98, 100, 105]
    assert clock.now + SLACK * seconds(3, 105) < entries[0].deadline_at


# --- a crowd ---------------------------------------------------------------------------------------------------------


@dataclass
class Crowd:
    """Clients that ask for *items* texts at once with *deadline_s*, and again as soon as it is over, of *callers* callers."""

    clients: int = 16
    items: int = 20
    deadline_s: float = 0.5
    callers: int = 1
    lengths: tuple[int, int] = (128, 128)
    slowness: Callable[[float], float] = lambda _at_s: 1.0
    in_time: int = 0
    tokens_in_time: int = 0
    outcomes: list[int] = field(default_factory=list)

    def ask(self, duration_s: float, seed: int = 0) -> "Crowd":
        """Let them ask a machine that takes `seconds` times *slowness* for *duration_s*, by a clock that is moved."""
        random, clock = Random(seed), Clock()
        start_at = clock.now
        cost = CostModel()
        cost.calibrate([(items, tokens, seconds(items, tokens)) for items in (1, 4, 16) for tokens in (8, 64, 256)])
        queues = LaneQueues(max_batch_tokens=2048, max_batch_items=128, sort_window=32, clock=clock)
        turns = [(start_at + random.uniform(0, self.deadline_s), client) for client in range(self.clients)]
        heapq.heapify(turns)
        asked: dict[int, list[Entry]] = {}
        while clock.now < start_at + duration_s:
            while turns[0][0] <= clock.now:
                at, client = heapq.heappop(turns)
                self._answer(queues, asked.pop(client, []))
                asked[client] = [
                    Entry(None, random.randint(*self.lengths), at + self.deadline_s) for _ in range(self.items)
                ]
                flow = Flow(Lane.QUERY, str(client % self.callers))
                for entry in asked[client]:
                    queues.add(flow, entry)
                heapq.heappush(turns, (at + self.deadline_s, client))
            _, batch = queues.next_batch(max_tokens=cost.budget_tokens(2048), predict=cost.predict_s)
            if not batch:
                clock.now = turns[0][0]
                continue
            took_s = seconds(len(batch), batch[-1].tokens) * self.slowness(clock.now - start_at)
            clock.now += took_s
            cost.observe(len(batch), batch[-1].tokens, took_s)
            for entry in batch:
                entry.prepared = clock.now <= entry.deadline_at
        return self

    def _answer(self, queues: LaneQueues, entries: list[Entry]) -> None:
        done = [entry for entry in entries if entry.prepared]
        self.in_time += len(done)
        self.tokens_in_time += sum(entry.tokens for entry in done)
        if entries:
            self.outcomes.append(len(done))
        for entry in entries:
            queues.remove(entry)

    def least_share(self) -> float:
        """Return what the request with the fewest texts in time had, by what they had on average."""
        return min(self.outcomes) / (sum(self.outcomes) / len(self.outcomes))


CAPACITY = 16 / seconds(16, 128)


@pytest.mark.parametrize(("callers", "deadline_s"), [(1, 0.5), (2, 0.5), (16, 0.5), (1, 1.0)])
def test_a_crowd_has_nearly_all_the_machine_can_do(callers, deadline_s):
    """Sixteen clients with many times what can be done by their deadlines: at least 85 % is, and each has half a share."""
    crowd = Crowd(callers=callers, deadline_s=deadline_s).ask(60)
    assert crowd.in_time / 60 >= 0.85 * CAPACITY
    assert crowd.least_share() >= 0.5


@pytest.mark.parametrize(
    ("crowd", "share"),
    [
        (Crowd(clients=64), 0.85),
        (Crowd(clients=400, items=1), 0.85),
        (Crowd(clients=4), 0.85),
        (Crowd(deadline_s=2.0), 0.85),
        (Crowd(clients=1, items=128, deadline_s=0.3), 0.8),
        (Crowd(callers=4, lengths=(20, 250)), 0.85),
        (Crowd(lengths=(20, 250)), 0.85),
    ],
    ids=["64 clients", "400 with one text", "4 clients", "patient", "alone", "mixed, 4 callers", "mixed"],
)
def test_any_crowd_gets_most_of_it(crowd, share):
    """However many, however patient, alone, or with texts of mixed lengths: counted in tokens, padding excluded."""
    crowd.ask(60)
    assert crowd.tokens_in_time / 60 >= share * CAPACITY * 128


@pytest.mark.parametrize(("period_s", "share"), [(20.0, 0.85), (4.0, 0.8)])
def test_a_machine_that_others_use_at_times(period_s, share):
    """While the machine is half as fast for half of the time, most of what it still can do is in time."""
    crowd = Crowd(slowness=lambda at_s: 2.0 if at_s % period_s > period_s / 2 else 1.0).ask(80)
    assert crowd.in_time / 80 >= share * 0.75 * CAPACITY


# --- the worker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("known", "first"), [(True, 4), (False, 20)])
async def test_a_batcher_plans_by_its_cost_model(known, first):
    """Once it knows what batches cost, a batch that would end after its deadline is smaller; before, it is not."""
    engine = Echo()
    async with running(engine) as batcher:
        if known:
            batcher.cost.calibrate([(1, 10, 10.0), (10, 10, 100.0)])  # A second a token.
        busy = await occupy(batcher, engine)
        asked = [f"text {number:03}" for number in range(20)]
        work = batcher.submit(asked, lane=Lane.QUERY, deadline=Deadline.after(60), allow_partial=True)
        done = asyncio.create_task(work)
        await until(lambda: len(engine.queued) == 21)
        engine.gate.set()
        await busy
        assert (await done).outputs == [text.upper() for text in asked]
    assert len(engine.batches[1]) == first
