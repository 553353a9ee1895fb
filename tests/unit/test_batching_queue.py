"""What waits for the model: which entries go into a batch, and which never do."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.batching.queue import Entry, Lane, LaneQueues, Ticket

FOREVER = float("inf")
ANY = 1 << 30


def make_queues(**changes) -> LaneQueues:
    """Return empty queues with small bounds."""
    bounds = {"max_batch_tokens": 100, "max_batch_items": 8, "sort_window": 16, **changes}
    return LaneQueues(**bounds)


def entries(*lengths: int, ticket: Ticket | None = None) -> list[Entry]:
    """Return an entry for each length, all of one ticket that waits for ever unless another is given."""
    ticket = ticket or Ticket(FOREVER)
    return [Entry(ticket, position, f"item {position}", tokens) for position, tokens in enumerate(lengths)]


def drain(queues: LaneQueues, *, bulk_budget_tokens: int = ANY) -> list[tuple[Lane, list[Entry]]]:
    """Take batches until nothing waits."""
    batches = []
    while len(queues):
        lane, batch = queues.next_batch(bulk_budget_tokens=bulk_budget_tokens)
        if batch:
            batches.append((lane, batch))
    return batches


class FlickeringTicket(Ticket):
    """A ticket whose caller goes away between two looks at it, as another thread can make it."""

    def __init__(self, looks: int) -> None:
        self._looks = looks
        super().__init__(FOREVER)

    @property
    def abandoned(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    @abandoned.setter
    def abandoned(self, value: bool) -> None:
        pass


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    max_tokens=st.integers(1, 200),
    max_items=st.integers(1, 12),
    window=st.integers(1, 24),
)
def test_batches_hold_the_oldest_within_the_budget_and_lose_nothing(lengths, max_tokens, max_items, window):
    """Each batch has the oldest entry, fits the budget unless it is one entry, and every entry leaves exactly once."""
    queues = make_queues(max_batch_tokens=max_tokens, max_batch_items=max_items, sort_window=window)
    waiting = entries(*lengths)
    queues.extend(Lane.QUERY, waiting)
    left = []
    while len(queues):
        oldest = next(entry for entry in waiting if not any(entry is gone for gone in left))
        _, batch = queues.next_batch(bulk_budget_tokens=ANY)
        assert any(entry is oldest for entry in batch)
        assert len(batch) <= max_items
        assert len(batch) == 1 or len(batch) * max(entry.tokens for entry in batch) <= max_tokens
        assert [entry.tokens for entry in batch] == sorted(entry.tokens for entry in batch)
        left += batch
    assert sorted(entry.position for entry in left) == list(range(len(lengths)))


@given(
    script=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(Lane), st.lists(st.integers(1, 40), min_size=1, max_size=10)),
            st.sampled_from(["take", "abandon", "drop"]),
        ),
        max_size=40,
    )
)
def test_whatever_happens_an_entry_runs_once_or_is_unwanted(script):
    """Under any mix of arrivals, batches and callers that go away, a wanted entry runs once, an unwanted one never."""
    queues = make_queues(max_batch_tokens=80, max_batch_items=4, sort_window=6)
    tickets: list[Ticket] = []
    submitted: list[Entry] = []
    run: list[Entry] = []

    def take() -> None:
        _, batch = queues.next_batch(bulk_budget_tokens=20)
        assert not any(entry.ticket.abandoned for entry in batch)
        run.extend(batch)

    for step in script:
        if step == "take":
            take()
        elif step == "abandon" and tickets:
            tickets[len(tickets) // 2].abandoned = True
        elif step == "drop" and tickets:
            tickets[-1].abandoned = True
            queues.drop(tickets[-1])
        elif isinstance(step, tuple):
            lane, lengths = step
            tickets.append(Ticket(FOREVER))
            made = entries(*lengths, ticket=tickets[-1])
            submitted += made
            queues.extend(lane, made)
    while len(queues):
        take()
    counts = {id(entry): sum(other is entry for other in run) for entry in submitted}
    assert set(counts.values()) <= {0, 1}
    assert all(counts[id(entry)] == 1 or entry.ticket.abandoned for entry in submitted)


def test_an_oversize_entry_goes_alone():
    """An entry over the whole budget is still served, in a batch of its own."""
    queues = make_queues(max_batch_tokens=10)
    queues.extend(Lane.QUERY, entries(50, 2, 2))
    batches = drain(queues)
    assert [[entry.tokens for entry in batch] for _, batch in batches] == [[50], [2, 2]]


def test_a_batch_takes_the_nearest_lengths():
    """A batch grows from its oldest entry towards the nearest lengths, so little is padding."""
    queues = make_queues(max_batch_tokens=40)
    queues.extend(Lane.QUERY, entries(10, 40, 11, 1, 9, 12))
    _, batch = queues.next_batch(bulk_budget_tokens=ANY)
    assert [entry.tokens for entry in batch] == [9, 10, 11]


def test_what_stays_keeps_its_order():
    """Entries that a batch leaves behind keep their place in the queue."""
    queues = make_queues(max_batch_tokens=20, sort_window=4)
    queues.extend(Lane.QUERY, entries(10, 19, 10, 18, 17, 16))
    assert [entry.position for entry in queues.next_batch(bulk_budget_tokens=ANY)[1]] == [0, 2]
    assert [entry.position for entry in queues.clear()] == [1, 3, 4, 5]


@pytest.mark.parametrize("unwanted", [Ticket(FOREVER), Ticket(0.0)], ids=["abandoned", "expired"])
def test_unwanted_entries_never_run(unwanted):
    """Entries whose caller left, or whose deadline passed, are in no batch, wherever in the queue they are."""
    unwanted.abandoned = unwanted.deadline_at == FOREVER
    wanted = Ticket(time.monotonic() + 3600)
    queues = make_queues()
    for ticket in (unwanted, wanted, unwanted, wanted, unwanted):
        queues.extend(Lane.BULK, entries(5, ticket=ticket))
    ran = [entry for _, batch in drain(queues) for entry in batch]
    assert [entry.ticket for entry in ran] == [wanted, wanted]


def test_a_caller_may_leave_while_its_batch_is_made():
    """A caller that goes away between two looks at its entry costs the worker nothing: the batch is empty, then the next."""
    queues = make_queues()
    queues.extend(Lane.QUERY, entries(5, ticket=FlickeringTicket(looks=1)))
    assert queues.next_batch(bulk_budget_tokens=ANY) == (Lane.QUERY, [])
    other = entries(7)
    queues.extend(Lane.QUERY, other)
    assert queues.next_batch(bulk_budget_tokens=ANY) == (Lane.QUERY, other)


def test_queries_go_first_and_bulk_gets_every_fifth_batch():
    """While both wait, four query batches go for one of bulk; neither starves."""
    queues = make_queues(max_batch_items=1, bulk_turn=4)
    queues.extend(Lane.BULK, entries(*[5] * 3))
    queues.extend(Lane.QUERY, entries(*[5] * 10))
    lanes = "".join(lane[0] for lane, _ in drain(queues))
    assert lanes == "qqqqbqqqqbqqb"


def test_a_lane_alone_has_all_batches():
    """Without queries bulk goes at once, and without bulk queries do."""
    queues = make_queues(max_batch_items=2)
    queues.extend(Lane.BULK, entries(5, 5, 5))
    assert [lane for lane, _ in drain(queues)] == [Lane.BULK, Lane.BULK]
    queues.extend(Lane.QUERY, entries(5, 5, 5))
    assert [lane for lane, _ in drain(queues)] == [Lane.QUERY, Lane.QUERY]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), budget=st.integers(0, 60))
def test_bulk_stays_within_its_budget(lengths, budget):
    """A bulk batch stays within the bulk budget, though it always has one entry; queries are not held to it."""
    queues = make_queues(max_batch_tokens=1000)
    queues.extend(Lane.BULK, entries(*lengths))
    for _, batch in drain(queues, bulk_budget_tokens=budget):
        assert len(batch) == 1 or len(batch) * batch[-1].tokens <= budget
    queues.extend(Lane.QUERY, entries(30, 30))
    assert len(queues.next_batch(bulk_budget_tokens=budget)[1]) == 2


def test_drop_removes_only_what_one_ticket_has_waiting():
    """Dropping a ticket tells how many entries it had, and leaves the others."""
    queues = make_queues()
    mine, other = Ticket(FOREVER), Ticket(FOREVER)
    queues.extend(Lane.QUERY, entries(5, 5, ticket=mine))
    queues.extend(Lane.BULK, entries(5, ticket=mine) + entries(5, ticket=other))
    assert queues.drop(mine) == 3
    assert queues.drop(mine) == 0
    assert (queues.depth(Lane.QUERY), queues.depth(Lane.BULK)) == (0, 1)
