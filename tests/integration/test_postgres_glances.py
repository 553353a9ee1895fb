"""The short reads that searches wait for, on a real PostgreSQL in trouble: their breaker, and how they are left."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.common.breaker import Breaker
from services.common.errors import DependencyUnavailable, NotFound, Unavailable
from services.search.ledger.postgres import PostgresLedger
from services.search.ports import Collection
from tests.contract.ledger_contract import make_collection, make_document
from tests.postgres_server import PATIENCE_S, PostgresServer, new_schema


@pytest.fixture
def breaker() -> Breaker:
    return Breaker("ledger", min_calls=2, in_a_row=2, reset_s=0.1)


@pytest.fixture
async def ledger(postgres_server: PostgresServer, breaker: Breaker) -> AsyncIterator[PostgresLedger]:
    ledger = await PostgresLedger.open(new_schema(postgres_server.url()), breaker=breaker)
    yield ledger
    await ledger.aclose()


@pytest.fixture
async def books(ledger: PostgresLedger) -> Collection:
    collection = make_collection()
    await ledger.create_collection(collection)
    return collection


async def test_a_server_that_is_gone_opens_the_breaker(
    ledger: PostgresLedger, books: Collection, breaker: Breaker, postgres_server: PostgresServer
) -> None:
    """After a few failures reads are refused untried; once the server is back a probe finds it."""
    postgres_server.stop()
    try:
        for _ in range(4):
            with pytest.raises(Unavailable):
                await ledger.state(books.uuid)
        assert breaker.state == "open"
        with pytest.raises(DependencyUnavailable):
            await ledger.find_collection("books")
    finally:
        postgres_server.start()
    async with asyncio.timeout(PATIENCE_S):
        while breaker.state != "closed":
            await asyncio.gather(ledger.state(books.uuid), return_exceptions=True)
            await asyncio.sleep(0.02)


async def test_writers_are_not_kept_from_trying(
    ledger: PostgresLedger, books: Collection, breaker: Breaker, postgres_server: PostgresServer
) -> None:
    """While searches' reads are paused a write still goes to the server, which may be back by then."""
    postgres_server.stop()
    try:
        for _ in range(4):
            await asyncio.gather(ledger.state(books.uuid), return_exceptions=True)
    finally:
        postgres_server.start()
    assert breaker.state == "open"
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await ledger.append(books.uuid, [make_document("d")])
                break
            except Unavailable:
                await asyncio.sleep(0.02)


async def test_wrong_questions_are_no_failures(ledger: PostgresLedger, breaker: Breaker) -> None:
    """A collection that is gone says nothing about the database's health."""
    for _ in range(6):
        with pytest.raises(NotFound):
            await ledger.state("nobody")
    assert breaker.state == "closed"


async def test_a_read_of_a_frozen_server_can_be_left_at_once(
    ledger: PostgresLedger, books: Collection, breaker: Breaker, postgres_server: PostgresServer
) -> None:
    """Cancelling does not wait for the server, counts neither way, and later reads have a new connection."""
    await ledger.state(books.uuid)
    postgres_server.freeze()
    try:
        reads = [asyncio.create_task(ledger.state(books.uuid)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for read in reads:
            read.cancel()
        done, pending = await asyncio.wait(reads, timeout=1.0)  # a connection's return to the pool would take 10 s
        assert not pending
        assert all(read.cancelled() for read in done)
        assert breaker.state == "closed"
    finally:
        postgres_server.thaw()
    assert (await ledger.state(books.uuid)).seq == 0
