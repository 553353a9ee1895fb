"""A read that a replica does not answer is asked of a second one: when, of whom, how often, and what is learnt from it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import pytest

from services.common.breaker import Breaker
from services.common.errors import DependencyUnavailable, InvalidInput
from services.common.retry_budget import RetryBudget
from services.search.ports import RetrievalQuery
from services.search.shards import replicas
from services.search.shards.calling import AskingOptions
from services.search.shards.replicas import HEDGE_LEAST_S, HEDGE_PRIOR_S, Replica
from services.search.shards.router import ShardRouter
from tests.shard_hosts import BOOKS, FakeHost, eventually, soon

ONE_SHARD = replace(BOOKS, shards=1)
VECTOR_ONLY = RetrievalQuery(1000, explain=True)
WORDS = RetrievalQuery(1000, text="word")
PATIENCE_S = 30.0  # far more than any test may take: what is not answered by a second host would use it up


@dataclass
class OneNode:
    """All shards are on the same hosts."""

    hosts: list[Replica]
    fallback: Replica | None = None

    def replicas(self, shard: int) -> Sequence[Replica]:
        return self.hosts

    def everyone(self) -> Sequence[Replica]:
        return [*self.hosts, *([self.fallback] if self.fallback else ())]


@pytest.fixture
def first() -> FakeHost:
    return FakeHost("first")


@pytest.fixture
def second() -> FakeHost:
    return FakeHost("second")


@pytest.fixture
def placement(first, second, monkeypatch) -> OneNode:
    """The second is only asked after the first, as it has something to do already."""
    monkeypatch.setattr(replicas, "HEDGE_PRIOR_S", 0.01)
    return OneNode([Replica(first), Replica(second, in_flight=100)])


@pytest.fixture
def wins() -> Counter[bool]:
    return Counter()


@pytest.fixture
def options(wins) -> AskingOptions:
    return AskingOptions(
        make_breaker=lambda name: Breaker(name, reset_s=PATIENCE_S),
        budget=RetryBudget(burst=100),
        note_hedge=lambda later: wins.update([later]),
    )


@pytest.fixture
async def router(placement, options) -> AsyncIterator[ShardRouter]:
    made = ShardRouter(placement, lambda text, language, *, stop_words: text.split(), options)
    yield made
    await made.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("verb", ["statistics", "search", "fetch"])
async def test_a_read_that_hangs_is_answered_by_the_second_host(router, first, second, verb, wins) -> None:
    """Whole and without a failure, whichever read it is; the first host's call is cancelled."""
    candidates = (await router.retrieve(BOOKS, WORDS, soon(PATIENCE_S))).candidates
    await router.forget(BOOKS)
    first.hangs = {verb}
    second.asked.clear()
    found = await router.retrieve(BOOKS, WORDS, soon(PATIENCE_S))
    documents = (await router.fetch(BOOKS, candidates, soon(PATIENCE_S))).documents
    assert (found.ok, found.failures, found.timed_out, len(documents)) == (4, {}, 0, 10)
    assert {asked for asked, _ in second.asked} >= {verb}
    assert wins[True] > 0
    await eventually(lambda: first.running == 0)


async def test_an_explained_search_tells_who_answered(router, first) -> None:
    """By shard: the host, how many were asked, and whether the second was while the first had not answered."""
    calm = (await router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S))).calls
    assert {(call.host, call.attempts, call.hedged) for call in calm.values()} == {("first", 1, False)}
    assert all(call.took_ms >= 0 and call.applied_seq == 10 for call in calm.values())
    first.hangs = {"search"}
    hedged = (await router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S))).calls
    assert {(call.host, call.attempts, call.hedged) for call in hedged.values()} == {("second", 2, True)}
    assert (await router.retrieve(BOOKS, RetrievalQuery(10), soon(PATIENCE_S))).calls == {}


async def test_a_host_that_fails_is_no_hedge(router, first) -> None:
    """The second is asked after it, at once."""
    first.error = DependencyUnavailable("away")
    calls = (await router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S))).calls
    assert {call.hedged for call in calls.values()} == {False}
    assert {call.host for call in calls.values()} == {"second"}


async def test_a_host_that_goes_on_losing_is_put_aside_and_its_breaker_opens(router, first, placement) -> None:
    """So that one that hangs costs only its first searches a wait, and is not asked any more."""
    first.hangs = {"search"}
    for _ in range(3):
        assert (await router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S))).ok == 4
    breaker = placement.hosts[0].breaker
    assert breaker is not None
    assert breaker.state == "open"
    before = len(first.asked)
    for _ in range(5):
        found = await router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S))
        assert {(call.host, call.hedged) for call in found.calls.values()} == {("second", False)}
    assert len(first.asked) == before


async def test_a_single_loss_is_forgiven(router, first, second, placement) -> None:
    """Five answers of a hundred are late by definition."""
    first.hangs = {"search"}
    assert (await router.retrieve(ONE_SHARD, VECTOR_ONLY, soon(PATIENCE_S))).calls[0].host == "second"
    await eventually(lambda: first.running == 0)
    assert placement.hosts[0].sound((ONE_SHARD.uuid, 0))
    first.hangs = set()
    assert (await router.retrieve(ONE_SHARD, VECTOR_ONLY, soon(PATIENCE_S))).calls[0].host == "first"


async def test_without_a_budget_nobody_is_asked_twice(placement, first, second) -> None:
    """The first host then has its share of the time, and the second what is left."""
    router = ShardRouter(placement, lambda text, language, *, stop_words: text.split())
    first.hangs = {"search"}
    found = await router.retrieve(BOOKS, VECTOR_ONLY, soon(0.5))
    assert {(call.host, call.hedged) for call in found.calls.values()} == {("second", False)}
    assert {call.attempts for call in found.calls.values()} == {2}
    await router.aclose()


async def test_extra_calls_stay_within_the_budget(placement, first, wins) -> None:
    """What it does not allow waits as if there were no hedging."""
    budget = RetryBudget(0.0, min_per_s=0.0, burst=1)
    options = AskingOptions(budget=budget, note_hedge=lambda later: wins.update([later]))
    router = ShardRouter(placement, lambda text, language, *, stop_words: text.split(), options)
    first.hangs = {"search"}
    found = await router.retrieve(BOOKS, VECTOR_ONLY, soon(0.5))
    assert Counter(call.hedged for call in found.calls.values()) == {True: 1, False: 3}
    assert sum(wins.values()) == 1
    await router.aclose()


async def test_only_a_sound_replica_is_asked_beside_another(router, placement, first, second) -> None:
    """Neither the fallback index, nor one that is behind, nor one that failed."""
    placement.hosts.pop()
    placement.fallback = Replica(FakeHost("fallback"))
    first.gate = asyncio.Event()
    asking = asyncio.create_task(router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S)))
    await asyncio.sleep(0.05)
    first.gate.set()
    assert {call.host for call in (await asking).calls.values()} == {"first"}
    behind = Replica(second, in_flight=100)
    placement.hosts.append(behind)
    for shard in range(BOOKS.shards):
        behind.stands_at((BOOKS.uuid, shard), 3, behind=True)
        assert not behind.sound((BOOKS.uuid, shard))


async def test_when_both_fail_the_failure_is_told(router, first, second) -> None:
    """The later one's."""
    first.gate = asyncio.Event()
    first.error, second.error = DependencyUnavailable("away"), DependencyUnavailable("away too")
    asking = asyncio.create_task(router.retrieve(ONE_SHARD, VECTOR_ONLY, soon(PATIENCE_S)))
    await eventually(lambda: second.asked != [])
    first.gate.set()
    assert (await asking).failures == {0: "away"}


async def test_a_question_that_is_at_fault_is_so_at_once(router, first, second) -> None:
    """Whichever host says so."""
    first.hangs = {"search"}
    second.error = InvalidInput("no such field")
    with pytest.raises(InvalidInput):
        await router.retrieve(ONE_SHARD, VECTOR_ONLY, soon(PATIENCE_S))


async def test_a_cancelled_search_cancels_both_calls(router, first, second, placement) -> None:
    """And blames nobody."""
    first.hangs = second.hangs = {"search"}
    asking = asyncio.create_task(router.retrieve(BOOKS, VECTOR_ONLY, soon(PATIENCE_S)))
    await eventually(lambda: first.running == second.running == 4)
    asking.cancel()
    await eventually(lambda: first.running == second.running == 0)
    assert [replica.breaker.status.failures for replica in placement.hosts] == [0, 0]
    assert all(replica.sound((BOOKS.uuid, 0)) for replica in placement.hosts)


async def test_the_delay_follows_what_answers_take() -> None:
    """A prior until enough answers were seen, then what 95 of 100 take, but never next to nothing."""
    host = Replica(FakeHost("host"))
    assert host.hedge_after_s("search") == HEDGE_PRIOR_S
    for number in range(100):
        host.took("search", 0.02 if number % 10 == 0 else 0.001)
        host.took("fetch", 0.0001)
    assert host.hedge_after_s("search") == 0.02
    assert host.hedge_after_s("fetch") == HEDGE_LEAST_S
    assert host.hedge_after_s("statistics") == HEDGE_PRIOR_S


async def test_who_is_to_blame_for_being_late_depends_on_what_it_usually_takes() -> None:
    """A host that answers in a millisecond had time enough in 50, one of which nothing is known had not."""
    host = Replica(FakeHost("host"))
    assert host.fair_s("search") == replicas.FAIR_TIME_S
    for _ in range(100):
        host.took("search", 0.001)
        host.took("fetch", 1.0)
    assert host.fair_s("search") == replicas.FAIR_LEAST_S
    assert host.fair_s("fetch") == replicas.FAIR_TIME_S
