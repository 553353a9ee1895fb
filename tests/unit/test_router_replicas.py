"""Several hosts for each shard: who is asked, who is asked instead, and what becomes of those that failed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from services.common.breaker import Breaker
from services.common.deadline import NO_DEADLINE
from services.common.errors import BackendFailed, DependencyUnavailable, InvalidInput
from services.search.ports import RetrievalQuery
from services.search.shards import asking, replicas
from services.search.shards.calling import AskingOptions
from services.search.shards.replicas import OneHost, Replica
from services.search.shards.router import ShardRouter
from tests.shard_hosts import BOOKS, FakeHost, eventually, soon

QUESTION = RetrievalQuery(1000, text="word")
AWAY = DependencyUnavailable("the node cannot be reached")


@dataclass
class TwoNodes:
    """Node 0 has the even shards, node 1 the odd ones; each has two replicas."""

    nodes: list[list[Replica]]
    fallback: Replica | None = None

    def replicas(self, shard: int) -> Sequence[Replica]:
        return self.nodes[shard % 2]

    def everyone(self) -> Sequence[Replica]:
        return [*self.nodes[0], *self.nodes[1], *([self.fallback] if self.fallback else ())]


@pytest.fixture
def hosts() -> dict[str, FakeHost]:
    return {name: FakeHost(name) for name in ("a0", "b0", "a1", "b1")}


@pytest.fixture
def failed() -> Counter[str]:
    return Counter()


@pytest.fixture
def placement(hosts) -> TwoNodes:
    made = {name: Replica(host) for name, host in hosts.items()}
    return TwoNodes([[made["a0"], made["b0"]], [made["a1"], made["b1"]]])


@pytest.fixture
async def router(placement, failed) -> AsyncIterator[ShardRouter]:
    made = ShardRouter(
        placement,
        lambda text, language, *, stop_words: text.split(),
        AskingOptions(
            make_breaker=lambda name: Breaker(name, reset_s=0.2),
            note_failure=lambda name: failed.update([name]),
            note_fallback=lambda: failed.update(["answered by the fallback"]),
        ),
    )
    yield made
    await made.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


def searches(host: FakeHost) -> int:
    return sum(verb == "search" for verb, _ in host.asked)


async def test_the_load_is_shared(router, hosts) -> None:
    """Of two idle replicas both are asked over time; one that is busy is left alone."""
    for _ in range(40):
        await router.retrieve(BOOKS, QUESTION, soon())
    assert all(searches(host) > 10 for host in hosts.values())
    hosts["a0"].gate = asyncio.Event()
    waiting = [asyncio.create_task(router.retrieve(BOOKS, QUESTION, NO_DEADLINE)) for _ in range(20)]
    await eventually(lambda: hosts["a0"].running > 0)
    before = hosts["a0"].running
    for _ in range(20):
        assert (await router.retrieve(BOOKS, QUESTION, soon())).ok == 4
    assert hosts["a0"].running == before
    hosts["a0"].gate.set()
    assert [found.ok for found in await asyncio.gather(*waiting)] == [4] * 20


async def test_a_replica_that_fails_costs_nothing_but_its_turn(router, hosts, failed) -> None:
    """No search fails; the host is put aside after its first failures, and is asked again once it is well."""
    hosts["a0"].error = AWAY
    for _ in range(50):
        found = await router.retrieve(BOOKS, QUESTION, soon())
        assert (found.ok, found.failures, len(found.candidates)) == (4, {}, 10)
    assert 0 < failed["a0"] < 10
    hosts["a0"].error = None
    before = searches(hosts["a0"])
    async with asyncio.timeout(10):
        while searches(hosts["a0"]) < before + 10:
            await router.retrieve(BOOKS, QUESTION, soon())
            await asyncio.sleep(0.01)


async def test_pauses_grow_while_a_host_stays_away(router, hosts, failed, monkeypatch) -> None:
    """It is tried ever more rarely, by one call at a time."""
    monkeypatch.setattr(replicas, "FIRST_ASIDE_S", 0.01)
    hosts["a0"].error = AWAY
    for _ in range(100):
        await router.retrieve(BOOKS, QUESTION, soon())
        await asyncio.sleep(0.005)
    assert failed["a0"] < 12


async def test_one_broken_shard_does_not_put_its_host_aside(router, hosts) -> None:
    """The host goes on answering for its other shards."""
    hosts["a0"].error, hosts["a0"].fails = BackendFailed("broken"), {0}
    for _ in range(40):
        assert (await router.retrieve(BOOKS, QUESTION, soon())).ok == 4
    asked = Counter(shard for verb, shard in hosts["a0"].asked if verb == "search")
    assert asked[2] > 10
    assert asked[0] < 10


async def test_a_replica_that_hangs_leaves_time_for_another(router, hosts) -> None:
    """It is given up after its share of the time that is left."""
    hosts["a0"].gate = asyncio.Event()
    for _ in range(6):
        assert (await router.retrieve(BOOKS, QUESTION, soon(1.0))).ok == 4
    assert hosts["a0"].running == 0


async def test_a_hasty_caller_puts_nobody_aside(router, hosts, failed) -> None:
    """A host that was given next to no time is not to blame."""
    hosts["a0"].gate = hosts["b0"].gate = asyncio.Event()
    found = await router.retrieve(BOOKS, RetrievalQuery(10), soon(0.05))
    assert (found.ok, found.timed_out) == (2, 2)
    assert not failed
    hosts["a0"].gate.set()


async def test_when_all_replicas_are_away_nobody_is_asked_for_a_while(router, hosts) -> None:
    """Their breakers open, the answer is partial and says so; it is whole soon after one is back."""
    hosts["a0"].error = hosts["b0"].error = AWAY
    for _ in range(5):
        found = await router.retrieve(BOOKS, QUESTION, soon())
        assert (found.ok, found.failures.keys()) == (2, {0, 2})
    assert found.breaker_open == 2
    before = len(hosts["a0"].asked) + len(hosts["b0"].asked)
    for _ in range(5):
        assert (await router.retrieve(BOOKS, QUESTION, soon())).breaker_open == 2
    assert len(hosts["a0"].asked) + len(hosts["b0"].asked) == before
    hosts["b0"].error = None
    async with asyncio.timeout(10):
        while (await router.retrieve(BOOKS, QUESTION, soon())).ok < 4:
            await asyncio.sleep(0.01)
    assert (await router.retrieve(BOOKS, QUESTION, soon())).breaker_open == 0


async def test_bad_input_is_not_tried_on_another(router, hosts, failed) -> None:
    """What is wrong with the question is wrong everywhere."""
    for host in hosts.values():
        host.error = InvalidInput("no such field")
    with pytest.raises(InvalidInput):
        await router.retrieve(BOOKS, QUESTION, soon())
    assert not failed


# --- the fallback index


async def test_the_fallback_answers_for_what_no_replica_does(router, hosts, placement, failed) -> None:
    """Only for the shards concerned, flagged and counted; fetching works too; and not once a replica is back."""
    placement.fallback = Replica(FakeHost("fallback", applied=9))
    assert (await router.retrieve(BOOKS, QUESTION, soon())).fallback == 0
    hosts["a0"].error = hosts["b0"].error = AWAY
    found = await router.retrieve(BOOKS, QUESTION, soon())
    assert (found.ok, found.fallback, found.failures, found.as_of) == (4, 2, {}, 9)
    assert failed["answered by the fallback"] == 2
    assert len((await router.fetch(BOOKS, found.candidates, soon())).documents) == len(found.candidates)
    hosts["b0"].error = None
    async with asyncio.timeout(10):
        while (await router.retrieve(BOOKS, QUESTION, soon())).fallback:
            await asyncio.sleep(0.01)


async def test_a_fallback_that_fails_too_leaves_a_partial_answer(router, hosts, placement) -> None:
    """Its failure is what is told."""
    placement.fallback = Replica(FakeHost("fallback", error=DependencyUnavailable("the fallback is away")))
    hosts["a0"].error = hosts["b0"].error = AWAY
    found = await router.retrieve(BOOKS, QUESTION, soon())
    assert (found.ok, found.fallback, found.failures.keys()) == (2, 0, {0, 2})


async def test_the_fallback_does_not_count_as_a_replica(router, hosts, placement) -> None:
    """What only it has applied is not applied; it is named beside the others in how things stand."""
    placement.fallback = Replica(FakeHost("fallback", applied=99))
    assert not await router.wait_applied(BOOKS, 50, soon(0.05))
    assert await router.applied_seq(BOOKS) == 10
    assert set(await router.standings(BOOKS, soon())) == {"a0", "b0", "a1", "b1", "fallback"}


# --- replicas that are behind


async def test_a_replica_that_catches_up_is_used_only_if_no_other_is_caught_up(router, hosts) -> None:
    """Its answer is passed over for another's; when all are catching up theirs is taken, flagged."""
    hosts["a0"].catching_up, hosts["a0"].applied = True, 3
    for _ in range(10):
        found = await router.retrieve(BOOKS, QUESTION, soon())
        assert (found.ok, found.catching_up, found.as_of) == (4, 0, 10)
    hosts["b0"].catching_up, hosts["b0"].applied = True, 5
    found = await router.retrieve(BOOKS, QUESTION, soon())
    assert (found.ok, found.catching_up) == (4, 2)
    hosts["b0"].error = AWAY
    assert (await router.retrieve(BOOKS, QUESTION, soon())).as_of in (3, 5)


async def test_a_replica_that_has_caught_up_is_used_again(router, hosts, monkeypatch) -> None:
    """It is looked at again after a little while."""
    monkeypatch.setattr(replicas, "BEHIND_S", 0.05)
    hosts["a0"].catching_up = True
    for _ in range(10):
        await router.retrieve(BOOKS, QUESTION, soon())
    hosts["a0"].catching_up = False
    before = searches(hosts["a0"])
    async with asyncio.timeout(10):
        while searches(hosts["a0"]) < before + 10:
            await router.retrieve(BOOKS, QUESTION, soon())
            await asyncio.sleep(0.01)


async def test_one_replica_of_each_shard_is_enough_to_be_applied(router, hosts) -> None:
    """Waiting ends with the first, also where the other is away; searches then see the operation."""
    hosts["a0"].error = AWAY
    hosts["b1"].applied = 5
    for name in ("b0", "a1"):
        hosts[name].applied = 20
    assert await router.wait_applied(BOOKS, 20, soon())
    hosts["a0"].error = None
    for _ in range(30):
        assert (await router.retrieve(BOOKS, QUESTION, soon())).as_of == 20
    assert await router.applied_seq(BOOKS) == 20


async def test_the_other_replica_is_used_once_it_has_applied_it_too(router, hosts) -> None:
    """It is still waited for after the first."""
    for name in ("b0", "a1", "b1"):
        hosts[name].applied = 20
    assert await router.wait_applied(BOOKS, 20, soon())
    hosts["a0"].applied = 20
    await asyncio.sleep(0.05)
    before = searches(hosts["a0"])
    for _ in range(30):
        assert (await router.retrieve(BOOKS, QUESTION, soon())).as_of == 20
    assert searches(hosts["a0"]) > before


async def test_latecomers_are_not_waited_for_for_ever(router, hosts, monkeypatch) -> None:
    """A replica that never applies it holds no task, however long the caller would have waited."""
    monkeypatch.setattr(asking, "LATECOMERS_S", 0.05)
    hosts["a0"].gate = asyncio.Event()
    for name in ("b0", "a1", "b1"):
        hosts[name].applied = 20
    assert await router.wait_applied(BOOKS, 20, NO_DEADLINE)
    assert hosts["a0"].running > 0
    await eventually(lambda: hosts["a0"].running == 0)


async def test_a_forgotten_collection_is_forgotten_everywhere(router, hosts, placement) -> None:
    """Every host is told, and nothing is kept of how it stood; a host that is away is no error."""
    hosts["a1"].error = AWAY
    await router.retrieve(BOOKS, QUESTION, soon())
    await router.forget(BOOKS)
    assert [host.forgotten for name, host in hosts.items() if name != "a1"] == [[BOOKS.uuid]] * 3
    assert not any(replica.applied for replica in placement.everyone())


async def test_a_shard_with_nobody_else_waits_for_the_probe_of_its_only_host() -> None:
    """Of many searches at once when a paused host is back, one tries it and the others are whole too."""
    host = FakeHost("only", error=AWAY)
    clock = [0.0]
    options = AskingOptions(make_breaker=lambda name: Breaker(name, reset_s=1.0, min_calls=1, clock=lambda: clock[0]))
    router = ShardRouter(OneHost(Replica(host)), lambda text, language, *, stop_words: text.split(), options)
    question = RetrievalQuery(1000)
    assert (await router.retrieve(BOOKS, question, soon())).ok == 0
    assert (await router.retrieve(BOOKS, question, soon())).breaker_open == BOOKS.shards
    host.error, clock[0] = None, 1.0
    found = await asyncio.gather(*(router.retrieve(BOOKS, question, soon()) for _ in range(5)))
    assert [one.ok for one in found] == [BOOKS.shards] * 5
    await router.aclose()
