"""What a host learns from a shared ledger: writes of other processes, new collections, and the ends of collections."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from math import inf

import pytest

from services.search.ports import Collection
from services.search.shards import host as hosts
from services.search.shards.host import LocalHost
from tests.local_hosts import QUESTION, MakeHost, applied, making, search
from tests.shard_hosts import BOOKS, FILMS, MemoryDirectory, MemoryLedger, eventually, many, soon

AN_HOUR_S = 3600.0
SEVERAL = [replace(FILMS, uuid=f"uuid-{n}", name=f"films-{n}") for n in range(12)]


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger(BOOKS, FILMS, exclusive=False)


@pytest.fixture
def directory() -> MemoryDirectory:
    return MemoryDirectory()


@pytest.fixture
async def make(ledger, directory) -> AsyncIterator[MakeHost]:
    async with making(ledger, directory) as make:
        yield make


def stand(host: LocalHost, shards: int, seq: int) -> bool:
    """Say whether so many shards are open, and all of them at *seq*."""
    return [standing.applied_seq for standing in host.open_standings()] == [seq] * shards


def openings(directory: MemoryDirectory, collection: Collection) -> int:
    return sum(name == collection.name for name, _, _ in directory.openings)


async def test_news_reach_open_and_closed_collections(ledger, make) -> None:
    """What others write is applied, also to a collection that was closed for being idle."""
    host = make(idle_close_s=0.05)
    await host.start()
    await host.search(BOOKS, 0, QUESTION, soon())
    for name in "ab":
        seq = ledger.write(BOOKS, **{name: "word"})
        await eventually(lambda seq=seq: stand(host, 4, seq))
        await eventually(lambda: not host.open_standings())


async def test_a_new_collection_is_followed_before_anybody_asks(ledger, make) -> None:
    """Its announcement opens it, with polls an hour apart, and it is caught up when the first search comes."""
    host = make(poll_s=AN_HOUR_S)
    await host.start()
    await asyncio.sleep(0)
    ledger.create(SEVERAL[0])
    ledger.write(SEVERAL[0], **many(20))
    await eventually(lambda: stand(host, 2, 20))
    answer = await host.search(SEVERAL[0], 0, QUESTION, soon())
    assert answer.candidates
    assert not answer.catching_up


async def test_what_was_empty_at_the_start_is_opened_by_its_first_write(ledger, directory, make) -> None:
    """Until then it is not open, and its standing is known."""
    host = make()
    await host.start()
    assert [standing.applied_seq for standing in await host.standings(BOOKS, soon())] == [0] * 4
    assert directory.openings == []
    seq = ledger.write(BOOKS, **many(20))
    await eventually(lambda: stand(host, 4, seq))


async def test_what_was_written_while_nobody_listened_is_found(ledger, directory, make) -> None:
    """A look finds new collections, and goes round the closed ones, though nothing was announced."""
    ledger.deaf = True
    for collection in SEVERAL:
        ledger.create(collection)
    host = make()
    await host.start()
    ledger.create(quiet := replace(FILMS, uuid="uuid-quiet", name="quiet"))
    for collection in (quiet, SEVERAL[-1]):
        ledger.write(collection, **many(20))
    await eventually(lambda: stand(host, 4, 20))
    assert {name for name, _, _ in directory.openings} == {"quiet", "films-11"}


async def test_other_nodes_shards_are_not_opened(ledger, directory, make) -> None:
    """A node that has none of a collection's shards leaves it alone; of another it opens its own."""
    host = make(node=2, nodes=3)
    await host.start()
    ledger.write(FILMS, **many(20))
    seq = ledger.write(BOOKS, **many(20))
    await eventually(lambda: stand(host, 1, seq))
    assert directory.openings == [("books", 2, True)]


async def test_many_new_collections_take_turns(ledger, directory, make, monkeypatch) -> None:
    """Each is caught up and kept in its turn, and no more are open than allowed."""
    monkeypatch.setattr(hosts, "KEPT_S", 0.0)
    most = 0

    def count(_shard) -> None:
        nonlocal most
        most = max(most, sum(not shard.closed for shard in list(directory.opened.values())))

    directory.prepare = count
    host = make(max_open=3)
    await host.start()
    for collection in SEVERAL:
        ledger.create(collection)
        ledger.write(collection, **many(20))
    await eventually(lambda: sum(is_kept(directory, one, 20) for one in SEVERAL) >= len(SEVERAL) - 3)
    await eventually(lambda: len(host.open_standings()) == 6)
    assert most <= 2 * (3 + hosts.OPENED_AT_ONCE)
    assert all(openings(directory, one) == 2 for one in SEVERAL)
    ledger.read_after.clear()
    assert [await search(host, one) for one in SEVERAL] == [set(many(20))] * len(SEVERAL)
    assert ledger.read_after == []


def is_kept(directory: MemoryDirectory, collection: Collection, seq: int) -> bool:
    kept = directory.kept.get(collection.uuid, {})
    return len(kept) == 2 and all(snapshot.origin.seq == seq for snapshot in kept.values())


async def test_what_is_in_use_does_not_make_room_for_news(ledger, directory, make) -> None:
    """A collection that was searched just now stays, and the one that news came for waits."""
    host = make(max_open=1)
    await host.start()
    seq = ledger.write(BOOKS, **many(20))
    await applied(host, seq)
    ledger.write(FILMS, **many(20))
    await asyncio.sleep(0.1)
    assert stand(host, 4, seq)
    assert openings(directory, FILMS) == 0
    assert await search(host, FILMS) <= set(many(20))


async def test_a_host_that_closes_nothing_for_being_idle_opens_all(ledger, directory, make) -> None:
    """From the start everything that has operations is open, also what its snapshots have whole; the rest is not."""
    first = make()
    await applied(first, ledger.write(BOOKS, **many(20)))
    await first.aclose()
    directory.openings.clear()
    host = make(idle_close_s=inf)
    await host.start()
    assert stand(host, 4, 20)
    assert {name for name, _, _ in directory.openings} == {"books"}


async def test_a_closed_collection_that_is_dropped_is_forgotten(ledger, directory, make) -> None:
    """Nobody follows it, so the look finds out, and removes what is left of it."""
    first = make()
    await applied(first, ledger.write(BOOKS, **many(20)))
    await first.aclose()
    host = make()
    await host.start()
    assert not host.open_standings()
    ledger.remove(BOOKS)
    await eventually(lambda: directory.removed == [BOOKS.uuid])
    assert not host.open_standings()


async def test_a_ledger_that_is_away_is_looked_at_again(ledger, make) -> None:
    """A look that fails is made again."""
    host = make()
    await host.start()
    ledger.down = True
    ledger.create(SEVERAL[0])
    seq = ledger.write(SEVERAL[0], **many(20))
    await asyncio.sleep(0.1)
    assert not host.open_standings()
    ledger.down = False
    await eventually(lambda: stand(host, 2, seq))
