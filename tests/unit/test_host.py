"""The host of this process's shards: opening, closing, snapshots, and the ends of collections."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.common.errors import BackendFailed, DeadlineExceeded, NotFound, NotReady
from services.search.shards.pace import GivenUp, Pace
from services.search.shards.trimming import MARKS, Trimmer
from tests.local_hosts import QUESTION, MakeHost, applied, making, search
from tests.shard_hosts import BOOKS, FILMS, MemoryDirectory, MemoryLedger, eventually, many, soon


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger(BOOKS, FILMS)


@pytest.fixture
def directory() -> MemoryDirectory:
    return MemoryDirectory()


@pytest.fixture
async def make(ledger, directory) -> AsyncIterator[MakeHost]:
    async with making(ledger, directory) as make:
        yield make


# --- opening


async def test_a_collection_is_opened_by_its_first_use(ledger, directory, make) -> None:
    """Nothing is open before; afterwards it follows the ledger."""
    host = make()
    seq = ledger.write(BOOKS, **many(20))
    assert directory.openings == []
    await applied(host, seq)
    assert await search(host) == set(many(20))
    statistics = [await host.statistics(BOOKS, shard, ["word"], soon()) for shard in range(4)]
    assert sum(found.documents for found in statistics) == 20
    found = [await host.fetch(BOOKS, shard, ["d3", "d99"], soon()) for shard in range(4)]
    assert [list(documents) for documents in found if documents] == [["d3"]]
    assert (
        len([match for shard in range(4) for match in await host.matching(BOOKS, shard, None, soon(), limit=99)]) == 20
    )
    assert [standing.applied_seq for standing in await host.standings(BOOKS, soon())] == [seq] * 4


async def test_the_start_opens_what_has_news(ledger, directory, make) -> None:
    """A collection whose snapshots have everything waits for its first search; what is left of deleted ones goes."""
    for collection in (BOOKS, FILMS):
        ledger.write(collection, **many(20))
    first = make()
    await first.start()
    await applied(first, 20)
    await applied(first, 20, FILMS)
    await first.aclose()
    seq = ledger.write(FILMS, new="word")
    directory.kept["uuid-gone"] = {}
    directory.openings.clear()
    second = make()
    await second.start()
    assert {name for name, _, _ in directory.openings} == {"films"}
    assert directory.removed == ["uuid-gone"]
    assert [standing.applied_seq for standing in await second.standings(BOOKS, soon())] == [20] * 4
    assert {name for name, _, _ in directory.openings} == {"films"}
    await applied(second, seq, FILMS)
    ledger.read_after.clear()
    assert await search(second) == set(many(20))
    assert ledger.read_after == []


async def test_callers_share_an_opening_and_do_not_wait_beyond_their_deadline(ledger, directory, make) -> None:
    """One that is late says so, another one's opening goes on, and each shard is opened once."""
    go_on = threading.Event()
    directory.prepare = lambda shard: go_on.wait(5)
    host = make()
    waiting = asyncio.create_task(host.search(BOOKS, 0, QUESTION, soon()))
    with pytest.raises(DeadlineExceeded):
        await host.search(BOOKS, 0, QUESTION, soon(0.05))
    go_on.set()
    assert (await waiting).shard == 0
    assert len(directory.openings) == 4


async def test_a_node_has_its_part_of_the_shards(ledger, directory, make) -> None:
    """Node 1 of 3 has the shards 1 of 4 and no other."""
    host = make(node=1, nodes=3)
    assert [standing.shard for standing in await host.standings(BOOKS, soon())] == [1]
    with pytest.raises(NotReady, match="not on this node"):
        await host.search(BOOKS, 2, QUESTION, soon())


async def test_answers_say_that_a_shard_is_catching_up(ledger, directory, make) -> None:
    """The flag is on answers until what was in the ledger at the opening is applied."""
    gate = asyncio.Event()
    directory.prepare = lambda shard: setattr(shard, "apply_gate", gate)
    seq = ledger.write(BOOKS, **many(20))
    host = make()
    assert (await host.search(BOOKS, 0, QUESTION, soon())).catching_up
    gate.set()
    await applied(host, seq)
    assert not (await host.search(BOOKS, 0, QUESTION, soon())).catching_up


# --- closing


async def test_idle_collections_are_closed_with_a_snapshot_and_opened_again(ledger, directory, make) -> None:
    """How it stands is known while it is closed; the next search opens it and reads nothing that it had."""
    host = make(idle_close_s=0.05)
    await host.start()
    seq = ledger.write(BOOKS, **many(20))
    await applied(host, seq)
    await eventually(lambda: not host.open_standings())
    await eventually(lambda: all(shard.closed for shard in directory.of(BOOKS)))
    assert {kept.origin.seq for kept in directory.kept[BOOKS.uuid].values()} == {seq}
    assert [standing.applied_seq for standing in await host.standings(BOOKS, soon())] == [seq] * 4
    assert len(directory.openings) == 4
    ledger.read_after.clear()
    assert await search(host) == set(many(20))
    assert ledger.read_after == []


async def test_no_more_are_open_than_allowed(ledger, directory, make) -> None:
    """The longest unused one makes room."""
    host = make(max_open=1)
    await search(host, FILMS)
    await search(host, BOOKS)
    await eventually(lambda: len(host.open_standings()) == 4)
    await eventually(lambda: all(shard.closed for shard in directory.of(FILMS)))
    await search(host, FILMS)
    await eventually(lambda: len(host.open_standings()) == 2)


async def test_a_search_under_way_is_not_closed_under(ledger, directory, make) -> None:
    """Closing for room waits for it."""
    gate = asyncio.Event()
    host = make()
    await applied(host, ledger.write(BOOKS, **many(20)))
    directory.of(BOOKS)[0].search_gate = gate
    asking = asyncio.create_task(host.search(BOOKS, 0, QUESTION, soon()))
    await eventually(lambda: directory.of(BOOKS)[0].searching == 1)
    closing = asyncio.create_task(host.aclose())
    await asyncio.sleep(0.05)
    assert not directory.of(BOOKS)[0].closed
    gate.set()
    assert (await asking).shard == 0
    await closing
    assert all(shard.closed for shard in directory.of(BOOKS))


async def test_closing_keeps_snapshots_and_refuses_questions(ledger, directory, make) -> None:
    """After `aclose` every shard is closed and kept; twice is allowed; maintenance was told to hurry."""
    host = make()
    await host.start()
    await applied(host, ledger.write(BOOKS, **many(20)))
    await host.aclose()
    await host.aclose()
    assert all(shard.closed for shard in directory.opened.values())
    assert {kept.origin.seq for kept in directory.kept[BOOKS.uuid].values()} == {20}
    assert directory.hurried
    with pytest.raises(NotReady):
        await host.search(BOOKS, 0, QUESTION, soon())
    host.notify(BOOKS, 21)


# --- snapshots and maintenance


async def test_snapshots_are_taken_after_so_many_operations(ledger, directory, make) -> None:
    """Not before, and again after as many more; what fails is tried later and does not stop the rest."""
    host = make(snapshot_operations=10, snapshot_interval_s=3600)
    await host.start()
    await applied(host, ledger.write(BOOKS, **many(9)))
    await asyncio.sleep(0.6)
    assert not directory.kept.get(BOOKS.uuid)
    assert host.snapshot_age_s > 0.4
    directory.of(BOOKS)[0].snapshot_error = BackendFailed("the disk is full")
    await applied(host, ledger.write(BOOKS, more="word"))
    await eventually(lambda: len(directory.kept[BOOKS.uuid]) == 3)
    assert {kept.origin.seq for kept in directory.kept[BOOKS.uuid].values()} == {10}


async def test_snapshots_are_taken_after_a_while(ledger, directory, make) -> None:
    """One operation is enough when the time is over."""
    host = make(snapshot_interval_s=0.1)
    await host.start()
    await applied(host, ledger.write(BOOKS, a="word"))
    await eventually(lambda: len(directory.kept.get(BOOKS.uuid, {})) == 4)
    assert host.snapshot_age_s == 0


async def test_a_snapshot_can_be_asked_for(ledger, directory, make) -> None:
    """It is true for what is applied; an audit reaches the shard too."""
    host = make()
    await applied(host, ledger.write(BOOKS, **many(20)))
    assert await host.snapshot(BOOKS, 2, soon()) == 20
    assert list(directory.kept[BOOKS.uuid]) == [2]
    assert (await host.audit(BOOKS, 2, soon(), repair=False)).applied_seq == 20


async def test_all_maintenance_that_is_due_is_done(ledger, directory, make) -> None:
    """Each shard's pieces, one after the other, without waiting between them."""
    directory.prepare = lambda shard: setattr(shard, "to_maintain", 5)
    host = make()
    await host.start()
    await search(host)
    await eventually(lambda: all(shard.to_maintain <= 0 for shard in directory.of(BOOKS)))


async def test_long_maintenance_is_kept_once_it_is_done(ledger, directory, make) -> None:
    """The shard whose pieces took long together gets a snapshot after the last of them, the others none."""
    host = make(worth_keeping_s=0.2, snapshot_interval_s=3600)
    await host.start()
    await applied(host, ledger.write(BOOKS, **many(20)))
    worked = directory.of(BOOKS)[1]
    worked.maintain_s, worked.to_maintain = 0.06, 20
    await eventually(lambda: directory.kept.get(BOOKS.uuid))
    assert worked.to_maintain < 0
    await asyncio.sleep(0.6)
    assert list(directory.kept[BOOKS.uuid]) == [worked.number]
    assert worked.snapshots == 1


# --- trimming


async def test_an_exclusive_ledger_is_trimmed_behind_the_older_snapshots(ledger, directory, make) -> None:
    """The first snapshots trim nothing; when there are newer ones the log goes up to the older."""
    host = make()
    trimmer = Trimmer(ledger, [host], interval_s=3600, after_s=3600)
    await applied(host, ledger.write(BOOKS, **many(20)))
    for shard in range(4):
        await host.snapshot(BOOKS, shard, soon())
    await trimmer.trim()
    assert ledger.trimmed[BOOKS.uuid] == 0
    await applied(host, ledger.write(BOOKS, new="word"))
    for shard in range(3):
        await host.snapshot(BOOKS, shard, soon())
    await trimmer.trim()
    assert ledger.trimmed[BOOKS.uuid] == 0
    await host.snapshot(BOOKS, 3, soon())
    await trimmer.trim()
    assert ledger.trimmed[BOOKS.uuid] == 20


async def test_a_shared_ledger_is_trimmed_by_time(ledger) -> None:
    """What was there a whole period ago is forgotten, and nothing newer."""
    ledger.exclusive = False
    trimmer = Trimmer(ledger, [], interval_s=3600, after_s=3600)
    ledger.write(BOOKS, **many(20))
    for _ in range(MARKS):
        await trimmer.trim()
        ledger.write(BOOKS, later="word")
    assert ledger.trimmed[BOOKS.uuid] == 0
    await trimmer.trim()
    assert ledger.trimmed[BOOKS.uuid] == 20
    ledger.remove(FILMS)
    ledger.collections.append(replace(FILMS, uuid="uuid-new"))
    await trimmer.trim()


# --- ends


async def test_a_forgotten_collection_is_closed_and_removed(ledger, directory, make) -> None:
    """Its shards are closed, then removed, waiters are told, and it cannot be opened again; others stay."""
    host = make()
    await search(host)
    waiter = asyncio.create_task(host.wait_applied(BOOKS, 0, 99, soon(60)))
    await asyncio.sleep(0)
    await host.forget(BOOKS)
    assert await waiter is False
    assert all(shard.closed for shard in directory.of(BOOKS))
    assert directory.removed == [BOOKS.uuid]
    with pytest.raises(NotFound):
        await host.search(BOOKS, 0, QUESTION, soon())
    host.notify(BOOKS, 5)
    assert await search(host, FILMS) == set()


async def test_forgetting_goes_on_when_its_caller_is_cancelled(directory, make) -> None:
    """A cancelled `forget` still closes and removes the shards."""
    host = make()
    await search(host)
    task = asyncio.create_task(host.forget(BOOKS))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: directory.removed == [BOOKS.uuid])
    assert all(shard.closed for shard in directory.of(BOOKS))


async def test_forgetting_during_the_opening_leaves_nothing_open(directory, make) -> None:
    """A collection that is forgotten while it opens is closed once it is open."""
    made, go_on = threading.Event(), threading.Event()

    def hold_up(_shard) -> None:
        made.set()
        go_on.wait(5)

    directory.prepare = hold_up
    host = make()
    host.notify(BOOKS, 1)
    await asyncio.to_thread(made.wait, 5)
    forgetting = asyncio.create_task(host.forget(BOOKS))
    await asyncio.sleep(0.01)
    go_on.set()
    await forgetting
    assert all(shard.closed for shard in directory.of(BOOKS))


async def test_only_the_ledger_says_that_a_collection_is_deleted(ledger, directory, make) -> None:
    """A router's word is checked; and what nobody said is found out by following."""
    host = make()
    ledger.exclusive = False
    await search(host)
    await search(host, FILMS)
    await host.forget_if_deleted(BOOKS)
    assert await search(host) == set()
    ledger.remove(BOOKS)
    await host.forget_if_deleted(BOOKS)
    ledger.remove(FILMS)
    await eventually(lambda: sorted(directory.removed) == [BOOKS.uuid, FILMS.uuid])


# --- pace


def test_the_pace_bounds_the_share_of_the_cpu() -> None:
    """Work that computes all the time is made to sleep; once stopped it is told to give up."""
    pauses: list[float] = []
    pace = Pace(0.25)
    pace._stopped.wait = pauses.append  # type: ignore[assignment]
    pace()
    for _ in range(3):
        sum(range(200_000))
        pace()
    assert len(pauses) == 3
    pace.stop()
    with pytest.raises(GivenUp):
        pace()
