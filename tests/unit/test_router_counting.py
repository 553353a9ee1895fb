"""The two rounds of a search for words: who is left out of the second, and when the first is not needed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from services.common.errors import DependencyUnavailable
from services.search.ports import RetrievalQuery
from services.search.shards.replicas import OneHost, Replica
from services.search.shards.router import ShardRouter
from services.search.shards.term_statistics import MOST_AGE_S
from tests.shard_hosts import BOOKS, FakeHost, soon
from tests.virtual_time import Clock

ASKED = RetrievalQuery(1000, text="red fox")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host() -> FakeHost:
    return FakeHost("node")


@pytest.fixture
async def router(host, clock) -> AsyncIterator[ShardRouter]:
    made = ShardRouter(OneHost(Replica(host)), lambda text, language, *, stop_words: text.split(), clock=clock)
    yield made
    await made.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def rounds(router: ShardRouter, host: FakeHost, query: RetrievalQuery = ASKED) -> Counter[str]:
    """Search, and return how many calls of each kind that took."""
    host.asked.clear()
    assert (await router.retrieve(BOOKS, query, soon())).ok == 4
    return Counter(verb for verb, _ in host.asked)


async def test_words_of_a_collection_that_stands_still_are_counted_once(router, host) -> None:
    """After two searches that saw it at the same operation; the question's statistics stay the same."""
    assert await rounds(router, host) == {"statistics": 4, "search": 4}
    assert await rounds(router, host) == {"statistics": 4, "search": 4}
    counted = host.queries[-1].statistics
    assert await rounds(router, host) == {"search": 4}
    assert host.queries[-1].statistics == counted
    assert await rounds(router, host, RetrievalQuery(10, text="fox")) == {"search": 4}
    assert await rounds(router, host, RetrievalQuery(10, text="red hen")) == {"statistics": 4, "search": 4}


async def test_after_a_write_the_search_itself_counts_anew(router, host) -> None:
    """No answer is scored with counts of before: it is asked for again, once."""
    for _ in range(3):
        await rounds(router, host)
    host.applied = 15
    assert await rounds(router, host) == {"search": 8, "statistics": 4}
    assert host.queries[-1].statistics.documents == 15
    assert await rounds(router, host) == {"statistics": 4, "search": 4}
    assert await rounds(router, host) == {"search": 4}


async def test_a_write_that_was_waited_for_is_counted_at_once(router, host) -> None:
    """The shards are known to have moved before they are asked."""
    for _ in range(3):
        await rounds(router, host)
    host.applied = 12
    assert await router.wait_applied(BOOKS, 12, soon())
    assert await rounds(router, host) == {"statistics": 4, "search": 4}
    assert host.queries[-1].statistics.documents == 12


async def test_counts_are_not_kept_for_ever(router, host, clock) -> None:
    """Nor those of a collection that was deleted."""
    for _ in range(3):
        await rounds(router, host)
    clock.now += MOST_AGE_S + 1
    assert await rounds(router, host) == {"statistics": 4, "search": 4}
    for _ in range(2):
        await rounds(router, host)
    await router.forget(BOOKS)
    assert await rounds(router, host) == {"statistics": 4, "search": 4}


@pytest.mark.parametrize("hurt", [{"catching_up": True}, {"lexical_failed": True}, {"applied": 3}])
async def test_counts_of_an_incomplete_collection_are_not_kept(router, host, hurt) -> None:
    """Of one that is catching up, whose words cannot be read, or that has an empty shard."""
    for name, value in hurt.items():
        setattr(host, name, value)
    for _ in range(4):
        assert await rounds(router, host) == {"statistics": 4, "search": 4}


async def test_a_shard_that_is_late_with_its_counts_is_not_waited_for_again(router, host) -> None:
    """The others are searched with the counts that there are; it is late, and not asked."""
    host.hangs_on = {("statistics", 2)}
    found = await router.retrieve(BOOKS, ASKED, soon(0.4))
    assert (found.ok, found.timed_out, found.failures) == (3, 1, {})
    assert ("search", 2) not in host.asked


async def test_where_all_are_late_with_their_counts_all_are_asked_still(router, host) -> None:
    """They may be opening the collection."""
    host.hangs = {"statistics"}
    found = await router.retrieve(BOOKS, ASKED, soon(0.4))
    assert (found.ok, found.timed_out) == (4, 0)


async def test_a_shard_that_fails_while_counting_is_told_and_not_asked(router, host) -> None:
    """Its failure is in the answer."""
    host.error, host.fails = DependencyUnavailable("broken pipe"), {1}
    found = await router.retrieve(BOOKS, ASKED, soon())
    assert (found.ok, found.failures) == (3, {1: "broken pipe"})
    assert ("search", 1) not in host.asked


async def test_shards_whose_words_failed_are_counted(router, host) -> None:
    """Each that answered with its vectors alone."""
    host.lexical_failed = True
    found = await router.retrieve(BOOKS, ASKED, soon())
    assert (found.ok, found.lexical_failed) == (4, 4)
