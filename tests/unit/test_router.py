"""The router over hosts that fail, hang and lag on command: one of them for each shard."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from services.common.deadline import NO_DEADLINE
from services.common.errors import BackendFailed, DeadlineExceeded, DependencyUnavailable, InvalidInput, NotReady
from services.search.ports import Candidate, Fetched, RetrievalQuery
from services.search.shards.replicas import OneHost, Replica
from services.search.shards.router import MAX_QUERY_TERMS, ShardRouter
from tests.shard_hosts import BOOKS, FakeHost, eventually, soon


def words(text: str, language: str, *, stop_words: bool) -> list[str]:
    """An analysis that shows what it was given."""
    return [word for word in [*text.split(), language] if stop_words or word != "the"]


def question(text: str | None = "word", **fields) -> RetrievalQuery:
    return RetrievalQuery(1000, text=text, **fields)


@pytest.fixture
def host() -> FakeHost:
    return FakeHost("local", applied=20)


@pytest.fixture(params=[True, False], ids=["local", "remote"])
async def router(host, request) -> AsyncIterator[ShardRouter]:
    made = ShardRouter(OneHost(Replica(host, local=request.param)), words)
    yield made
    await made.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_all_shards_answer_together(router, host) -> None:
    """Candidates of all shards come in one list with what they are true for; stage times are the slowest shard's."""
    found = await router.retrieve(BOOKS, question(), soon())
    assert {candidate.id for candidate in found.candidates} == {f"d{n}" for n in range(1, 21)}
    assert (found.total, found.ok, found.catching_up, found.timed_out, found.fallback) == (4, 4, 0, 0, 0)
    assert (found.failures, found.as_of) == ({}, 20)
    assert found.timings_ms["lexical"] == 3.0
    assert found.timings_ms["statistics"] >= 0


async def test_the_question_is_analysed_once_with_statistics_of_all(router, host) -> None:
    """Every shard is asked with the collection's terms, in its language, and the sum of all shards' statistics."""
    found = await router.retrieve(BOOKS, question("the red red fox", stop_words=False), soon())
    assert found.terms == ["red", "red", "fox", "english"]
    assert found.statistics is not None
    assert (found.statistics.documents, found.statistics.doc_freq) == (20, {"red": 4, "fox": 4, "english": 4})
    assert all(query.terms == found.terms and query.statistics == found.statistics for query in host.queries)
    long = await router.retrieve(BOOKS, question("word " * 2000), soon())
    assert len(long.terms) == MAX_QUERY_TERMS


async def test_every_option_reaches_the_shards(router, host) -> None:
    """Vector, filter, match, prefix, exact, explain and facets are passed on; without words none are counted."""
    vector = np.ones(2, np.float32)
    asked = RetrievalQuery(7, vector, None, "filter", "all", prefix=True, exact=True, explain=True, facets={"lang": 1})
    found = await router.retrieve(BOOKS, asked, soon())
    query = host.queries[0]
    assert query.vector is vector
    assert (query.limit, query.filter, query.match, query.prefix, query.exact) == (7, "filter", "all", True, True)
    assert (query.terms, query.statistics, found.terms, found.statistics) == ((), None, (), None)
    assert "statistics" not in {verb for verb, _ in host.asked}
    assert found.plans == {shard: {"host": "local"} for shard in range(4)}
    assert found.facets == {"lang": {"en": 8}}


async def test_facets_are_added_up_over_shards(router) -> None:
    """The commonest values of all shards together come first."""
    found = await router.retrieve(BOOKS, question(facets={"lang": 5, "year": 1}), soon())
    assert list(found.facets["lang"].items()) == [("en", 8), ("de", 6)]
    assert found.facets["year"] == {"en": 8}


async def test_a_failing_shard_is_named_and_the_others_answer(router, host) -> None:
    """Its failure is in the reply, for a caller to read."""
    host.error, host.fails = BackendFailed("the index is broken"), {2}
    found = await router.retrieve(BOOKS, question(), soon())
    assert (found.total, found.ok, found.failures) == (4, 3, {2: "the index is broken"})
    assert {candidate.shard for candidate in found.candidates} == {0, 1, 3}


async def test_an_exception_of_any_kind_tells_the_caller_its_kind_only(router, host) -> None:
    """What it says is for the log."""
    host.error, host.fails = ZeroDivisionError("secret"), {1}
    found = await router.retrieve(BOOKS, question(None), soon())
    assert found.failures == {1: "ZeroDivisionError"}


async def test_no_answer_is_an_empty_result(router, host) -> None:
    """When every shard fails nothing is raised: ok is 0 and every failure is named."""
    host.error = BackendFailed("broken")
    found = await router.retrieve(BOOKS, question(), soon())
    assert (found.candidates, found.ok, len(found.failures), found.as_of) == ([], 0, 4, 0)


async def test_a_shard_that_hangs_is_late(router, host) -> None:
    """All shards' answers are awaited until the deadline, not beyond; the late calls go on and end by themselves."""
    host.gate = asyncio.Event()
    found = await router.retrieve(BOOKS, question(None), soon(0.2))
    assert (found.ok, found.timed_out, found.failures) == (0, 4, {})
    assert host.running == 4
    host.gate.set()
    await eventually(lambda: host.running == 0)


async def test_a_host_that_is_late_itself_counts_as_late(router, host) -> None:
    """A node that says that it had too little time is no failure."""
    host.error, host.fails = DeadlineExceeded("late"), {1}
    found = await router.retrieve(BOOKS, question(None), soon())
    assert (found.ok, found.timed_out, found.failures) == (3, 1, {})


async def test_bad_input_is_the_callers(router, host) -> None:
    """InvalidInput from a shard reaches the caller instead of counting as a failure."""
    host.error = InvalidInput("the vector has 3 numbers")
    for asked in (question(), question(None)):
        with pytest.raises(InvalidInput):
            await router.retrieve(BOOKS, asked, soon())


async def test_a_cancelled_caller_stops_only_itself(router, host) -> None:
    """Its own searches end, another caller's go on."""
    host.gate = asyncio.Event()
    gone = asyncio.create_task(router.retrieve(BOOKS, question(None), NO_DEADLINE))
    stays = asyncio.create_task(router.retrieve(BOOKS, question(None), NO_DEADLINE))
    await eventually(lambda: host.running == 8)
    gone.cancel()
    await eventually(lambda: host.running == 4)
    host.gate.set()
    assert (await stays).ok == 4


async def test_fetch_returns_what_is_still_there(router, host) -> None:
    """Fields come by id over all shards; what is gone, and what a failing shard has, is missing."""
    candidates = (await router.retrieve(BOOKS, question(), soon())).candidates
    whole = await router.fetch(BOOKS, candidates, soon())
    assert (whole.documents.keys(), whole.failed) == ({f"d{n}" for n in range(1, 21)}, frozenset())
    host.applied = 10
    behind = await router.fetch(BOOKS, candidates, soon())
    assert (behind.documents.keys(), behind.failed) == ({f"d{n}" for n in range(1, 11)}, frozenset())
    host.error, host.fails = BackendFailed("broken"), {candidates[0].shard}
    broken = await router.fetch(BOOKS, candidates, soon())
    assert candidates[0].id not in broken.documents
    assert (broken.failed, broken.late) == (host.fails, frozenset())
    host.error = DeadlineExceeded("late")
    late = await router.fetch(BOOKS, candidates, soon())
    assert late.failed == late.late == host.fails
    assert await router.fetch(BOOKS, [Candidate("d1", 3, 0, None, None)], soon()) == Fetched({})
    assert await router.fetch(BOOKS, [], soon()) == Fetched({})


async def test_matching_is_whole_or_nothing(router, host) -> None:
    """All shards' matches up to the limit; a shard that fails or is late is an error, as some would be missing."""
    assert len(await router.matching(BOOKS, None, soon(), limit=99)) == 20
    assert len(await router.matching(BOOKS, None, soon(), limit=7)) == 7
    host.error, host.fails = BackendFailed("broken"), {2}
    with pytest.raises(DependencyUnavailable, match="Shard 2 of 'books'"):
        await router.matching(BOOKS, None, soon(), limit=99)
    host.error, host.gate = None, asyncio.Event()
    with pytest.raises(DeadlineExceeded):
        await router.matching(BOOKS, None, soon(0.05), limit=99)
    host.gate.set()


async def test_waiting_for_an_operation(router, host) -> None:
    """True once every shard has it, False at the deadline, and False where a shard cannot say."""
    assert await router.wait_applied(BOOKS, 20, soon())
    assert not await router.wait_applied(BOOKS, 21, soon(0.05))
    waiting = asyncio.create_task(router.wait_applied(BOOKS, 21, soon()))
    await asyncio.sleep(0.02)
    host.applied = 21
    assert await waiting
    host.error, host.fails = BackendFailed("broken"), {0}
    assert not await router.wait_applied(BOOKS, 21, soon())


async def test_orders_reach_the_host(router, host) -> None:
    """How shards stand, audits and snapshots come by the host's name; notices and deletions are passed on."""
    assert await router.applied_seq(BOOKS) == 20
    assert [standing.shard for standing in (await router.standings(BOOKS, soon()))["local"]] == [0, 1, 2, 3]
    assert [report.shard for report in (await router.audit(BOOKS, soon(), repair=True))["local"]] == [0, 1, 2, 3]
    assert await router.snapshot(BOOKS, soon()) == {"local": dict.fromkeys(range(4), 20)}
    router.notify(BOOKS, 21)
    assert host.notified == [21]
    await router.forget(BOOKS)
    assert host.forgotten == [BOOKS.uuid]
    host.error = BackendFailed("broken")
    assert await router.applied_seq(BOOKS) == 0
    assert await router.standings(BOOKS, soon()) == {}
    await router.forget(BOOKS)


async def test_a_closed_router_refuses_questions(router, host) -> None:
    """Late answers are dropped, and notices do nothing; closing twice is allowed."""
    host.gate = asyncio.Event()
    await router.retrieve(BOOKS, question(None), soon(0.02))
    await router.aclose()
    await router.aclose()
    assert host.running == 0
    with pytest.raises(NotReady):
        await router.retrieve(BOOKS, question(), soon())
    router.notify(BOOKS, 30)
    assert host.notified == []
