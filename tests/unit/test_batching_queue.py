"""What waits for the model: which entries go into a batch, and which never do."""

import time
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.common.batching.packing import allot
from services.common.batching.queue import Entry, Flow, Lane, LaneQueues

ANY = 1 << 30


def make_queues(**changes) -> LaneQueues:
    """Return empty queues with small bounds."""
    bounds = {"max_batch_tokens": 100, "max_batch_items": 8, "sort_window": 16, **changes}
    return LaneQueues(**bounds)


def put(
    queues: LaneQueues, lane: Lane, *lengths: int, caller: str = "", deadline_at: float = float("inf")
) -> list[Entry]:
    """Queue one submission with an entry for each length, named by its position."""
    flow = Flow(lane, caller)
    made = [Entry(f"{caller}{position}", tokens, deadline_at) for position, tokens in enumerate(lengths)]
    for entry in made:
        queues.add(flow, entry)
    return made


def drain(queues: LaneQueues, **limits) -> list[tuple[Lane, list[Entry]]]:
    """Take batches until nothing waits."""
    batches = []
    while len(queues):
        lane, batch = queues.next_batch(**limits)
        if batch:
            batches.append((lane, batch))
    return batches


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    max_tokens=st.integers(1, 200),
    max_items=st.integers(1, 12),
    window=st.integers(1, 24),
)
def test_batches_hold_the_oldest_within_the_budget_and_lose_nothing(lengths, max_tokens, max_items, window):
    """Each batch has the oldest entry, fits the budget unless it is one entry, and every entry leaves exactly once."""
    queues = make_queues(max_batch_tokens=max_tokens, max_batch_items=max_items, sort_window=window)
    waiting = put(queues, Lane.QUERY, *lengths)
    while len(queues):
        _, batch = queues.next_batch()
        assert waiting[0] in batch
        assert len(batch) <= max_items
        assert len(batch) == 1 or len(batch) * max(entry.tokens for entry in batch) <= max_tokens
        assert [entry.tokens for entry in batch] == sorted(entry.tokens for entry in batch)
        for entry in batch:
            waiting.remove(entry)
    assert waiting == []


@given(
    script=st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(Lane), st.sampled_from("abc"), st.lists(st.integers(0, 40), min_size=1, max_size=10)
            ),
            st.tuples(st.sampled_from(["remove", "move"]), st.integers(0, 1000)),
            st.sampled_from(["take", "expire"]),
        ),
        max_size=40,
    )
)
def test_whatever_happens_an_entry_runs_once_or_is_unwanted(script):
    """Under any mix of arrivals, batches, moves and callers that go away, a wanted entry runs once, an unwanted one never."""
    queues = make_queues(max_batch_tokens=80, max_batch_items=4, sort_window=6)
    submitted: list[Entry] = []
    unwanted: list[Entry] = []
    run: list[Entry] = []
    for step in script:
        if step == "take":
            run += queues.next_batch(bulk_fits=lambda items, longest: items * longest <= 20)[1]
        elif step == "expire":
            unwanted += put(queues, Lane.BULK, 5, caller="a", deadline_at=time.monotonic() - 1)
        elif step[0] in ("remove", "move"):
            for entry in submitted[step[1] % (len(submitted) or 1) :][:1]:
                if queues.remove(entry):
                    if step[0] == "move":
                        queues.add(Flow(Lane.QUERY, "b"), entry)
                    else:
                        unwanted.append(entry)
        else:
            lane, caller, lengths = step
            submitted += put(queues, lane, *lengths, caller=caller)
        assert sum(queues.load(lane)[0] for lane in Lane) == len(queues)
    run += [entry for _, batch in drain(queues) for entry in batch]
    assert len(run) == len(set(run))
    assert set(run) == set(submitted) - set(unwanted)
    assert [queues.load(lane) for lane in Lane] == [(0, 0, 0)] * 2


def test_an_oversize_entry_goes_alone():
    """An entry over the whole budget is still served, in a batch of its own."""
    queues = make_queues(max_batch_tokens=10)
    put(queues, Lane.QUERY, 50, 2, 2)
    assert [[entry.tokens for entry in batch] for _, batch in drain(queues)] == [[50], [2, 2]]


def test_a_batch_takes_the_nearest_lengths():
    """A batch grows from its oldest entry towards the nearest lengths, so little is padding."""
    queues = make_queues(max_batch_tokens=40)
    put(queues, Lane.QUERY, 10, 40, 11, 1, 9, 12)
    assert [entry.tokens for entry in queues.next_batch()[1]] == [9, 10, 11]


def test_what_stays_keeps_its_order():
    """Entries that a batch leaves behind keep their place in the queue."""
    queues = make_queues(max_batch_tokens=20, sort_window=4)
    put(queues, Lane.QUERY, 10, 19, 10, 18, 17, 16)
    assert [entry.prepared for entry in queues.next_batch()[1]] == ["0", "2"]
    assert [entry.prepared for entry in queues.clear()] == ["1", "3", "4", "5"]
    assert len(queues) == 0


def test_expired_entries_never_run():
    """Entries whose deadline passed are in no batch, wherever in the queue they are."""
    queues = make_queues()
    expired, wanted = [], []
    for passed in (True, False, True, False, True):
        (expired if passed else wanted).extend(
            put(queues, Lane.BULK, 5, deadline_at=time.monotonic() + (-1 if passed else 3600))
        )
    assert [entry for _, batch in drain(queues) for entry in batch] == wanted
    put(queues, Lane.BULK, 5, deadline_at=0.0)
    assert queues.next_batch() == (Lane.BULK, [])


def test_queries_go_first_and_bulk_gets_every_fifth_batch():
    """While both wait, four query batches go for one of bulk; neither starves."""
    queues = make_queues(max_batch_items=1, bulk_turn=4)
    put(queues, Lane.BULK, *[5] * 3)
    put(queues, Lane.QUERY, *[5] * 10)
    assert "".join(lane[0] for lane, _ in drain(queues)) == "qqqqbqqqqbqqb"


def test_a_lane_alone_has_all_batches():
    """Without queries bulk goes at once, and without bulk queries do."""
    queues = make_queues(max_batch_items=2)
    put(queues, Lane.BULK, 5, 5, 5)
    assert [lane for lane, _ in drain(queues)] == [Lane.BULK, Lane.BULK]
    put(queues, Lane.QUERY, 5, 5, 5)
    assert [lane for lane, _ in drain(queues)] == [Lane.QUERY, Lane.QUERY]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), budget=st.integers(0, 60))
def test_bulk_stays_within_its_limit(lengths, budget):
    """A bulk batch stays within what it is allowed, though it always has one entry; queries are not held to it."""
    queues = make_queues(max_batch_tokens=1000)
    put(queues, Lane.BULK, *lengths)

    def fits(items: int, longest: int) -> bool:
        return items * longest <= budget

    for _, batch in drain(queues, bulk_fits=fits):
        assert len(batch) == 1 or len(batch) * batch[-1].tokens <= budget
    put(queues, Lane.QUERY, 30, 30)
    assert len(queues.next_batch(bulk_fits=fits)[1]) == 2


def test_a_lower_budget_holds_for_both_lanes():
    """The budget of one batch may be lowered, never raised."""
    queues = make_queues(max_batch_tokens=20)
    for lane in Lane:
        put(queues, lane, *[5] * 8)
    assert {len(batch) for _, batch in drain(queues, max_tokens=10)} == {2}
    put(queues, Lane.QUERY, *[5] * 8)
    assert {len(batch) for _, batch in drain(queues, max_tokens=ANY)} == {4}


def test_removing_takes_one_entry_once():
    """Removing tells whether the entry waited, and leaves the others."""
    queues = make_queues()
    first, second, third = put(queues, Lane.QUERY, 5, 6, 7)
    assert queues.remove(second)
    assert not queues.remove(second)
    assert queues.load(Lane.QUERY) == (2, 12, 74)
    assert queues.next_batch()[1] == [first, third]
    assert not queues.remove(first)


# --- turns -------------------------------------------------------------------------------------------------------


@given(
    backlogs=st.lists(st.lists(st.integers(1, 90), min_size=40, max_size=60), min_size=1, max_size=5),
    before=st.integers(0, 15),
    length=st.integers(1, 90),
    window=st.integers(1, 40),
)
@example(backlogs=[[1] * 40] * 4, before=0, length=1, window=1)
def test_a_caller_that_joins_is_served_soon(backlogs, before, length, window):
    """With n callers that have much waiting, a new one's entry is in one of the next 4 (n + 1) batches, whatever its length."""
    queues = make_queues(max_batch_items=2, sort_window=window)
    for number, lengths in enumerate(backlogs):
        put(queues, Lane.BULK, *lengths, caller=f"caller {number}")
    for _ in range(before):
        queues.next_batch()
    (new,) = put(queues, Lane.BULK, length, caller="new")
    taken = [entry for _ in range(4 * (len(backlogs) + 1)) for entry in queues.next_batch()[1]]
    assert new in taken


@given(seed=st.integers(0, 1 << 32), callers=st.integers(2, 4), window=st.integers(4, 64))
def test_callers_with_much_waiting_get_equal_shares(seed, callers, window):
    """However many submissions a caller has, and however long its texts are, callers are served about as many tokens each."""
    random = Random(seed)
    queues = make_queues(max_batch_tokens=200, max_batch_items=50, sort_window=window)
    owner: dict[Entry, int] = {}
    for number in range(callers):
        shortest, longest = sorted(random.randint(13, 60) for _ in range(2))
        for _ in range(submissions := random.randint(1, 8)):
            lengths = [random.randint(shortest, longest) for _ in range(96 // submissions)]
            owner.update(dict.fromkeys(put(queues, Lane.BULK, *lengths, caller=f"caller {number}"), number))
    waiting = [list(owner.values()).count(number) for number in range(callers)]
    served = [0] * callers
    while all(waiting):
        # A caller owes at most a batch (200) to be in another's, and that batch; a quantum is 50, and one round may be under way.
        assert max(served) - min(served) <= 200 + 200 + 50 + 50
        for entry in queues.next_batch()[1]:
            served[owner[entry]] += entry.tokens
            waiting[owner[entry]] -= 1


@pytest.mark.parametrize("caller", ["the same", "another"])
@pytest.mark.parametrize("length", [3, 10, 40])
def test_a_large_submission_does_not_hold_up_a_small_one(caller, length):
    """One text behind 2,048 others, of the same caller or of another, is in one of the next two batches."""
    queues = make_queues(max_batch_tokens=100, sort_window=512)
    put(queues, Lane.QUERY, *[10] * 2048, caller="the same")
    queues.next_batch()
    (small,) = put(queues, Lane.QUERY, length, caller=caller)
    assert small in [entry for _ in range(2) for entry in queues.next_batch()[1]]


def test_ten_submissions_of_one_caller_do_not_starve_another():
    """Turns are the callers', not the submissions': the one that has one submission gets half."""
    queues = make_queues(max_batch_tokens=100)
    for _ in range(10):
        put(queues, Lane.BULK, *[10] * 100, caller="many")
    single = set(put(queues, Lane.BULK, *[10] * 100, caller="single"))
    served = [entry for _ in range(20) for entry in queues.next_batch()[1]]
    assert 70 <= len(single & set(served)) <= 90


def test_short_texts_of_one_caller_keep_their_order():
    """Submissions of one text each go in the order they came."""
    queues = make_queues(max_batch_items=4)
    made = [put(queues, Lane.QUERY, 10)[0] for _ in range(12)]
    assert [entry for _, batch in drain(queues) for entry in batch] == made


def test_what_goes_before_a_small_submission_is_little():
    """The tokens before a new submission count turns: a caller's long queue is in its own way, not in another's."""
    queues = make_queues()
    put(queues, Lane.BULK, *[10] * 200, caller="long")
    put(queues, Lane.BULK, *[10] * 2, caller="short")
    assert queues.tokens_before(Lane.BULK, "new", 30) == 30 + 20
    assert queues.tokens_before(Lane.BULK, "long", 3000) == 2000 + 20
    assert queues.tokens_before(Lane.QUERY, "new", 30) == 0


@given(waiting=st.lists(st.integers(0, 30), max_size=20), places=st.integers(0, 60))
def test_places_are_shared_out_in_turn(waiting, places):
    """As many places as there are, or are asked for, go out; nobody gets more than it has, or less than its share of it."""
    allotted = allot(waiting, places)
    assert sum(allotted) == min(places, sum(waiting))
    assert all(0 <= got <= asked for got, asked in zip(allotted, waiting, strict=True))
    share = places // max(1, len(waiting))
    assert all(got >= min(asked, share) for got, asked in zip(allotted, waiting, strict=True))
