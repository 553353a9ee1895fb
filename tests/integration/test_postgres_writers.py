"""Several routers on one PostgreSQL: what they write, follow, hear and make at the same time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest

from services.common.errors import Conflict
from services.search.ledger.postgres import PostgresLedger
from services.search.ledger.postgres.connections import Address, connect, insist_on_durability
from services.search.ports import Collection, CollectionState, Operation, Receipt
from tests.contract.ledger_contract import log, make_collection, make_document
from tests.postgres_server import PostgresServer, new_schema


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    """A ledger of this test's own."""
    return new_schema(postgres_server.url())


@pytest.fixture
async def routers(url: str, stack: AsyncExitStack) -> list[PostgresLedger]:
    """Two routers' ledgers on one database."""
    ledgers = [await PostgresLedger.open(url, pool_size=4) for _ in range(2)]
    for ledger in ledgers:
        stack.push_async_callback(ledger.aclose)
    return ledgers


@pytest.fixture
async def books(routers: list[PostgresLedger]) -> Collection:
    collection = make_collection()
    await routers[0].create_collection(collection)
    return collection


@pytest.fixture
async def raw(url: str, stack: AsyncExitStack) -> asyncpg.Connection:
    """A connection for plain SQL in the ledger's schema."""
    address = Address.parse(url)
    connection = await asyncpg.connect(address.dsn, server_settings={"search_path": address.schema})
    stack.push_async_callback(connection.close)
    return connection


async def follow(ledger: PostgresLedger, collection: Collection, last: int) -> list[Operation]:
    """Read the log as a follower does, a few operations at a time, up to number *last*."""
    seen: list[Operation] = []
    while not seen or seen[-1].seq < last:
        found = await ledger.operations_after(collection.uuid, seen[-1].seq if seen else 0, limit=3)
        seen += found
        if not found:
            await ledger.wait_for_news(0.02)
    return seen


async def test_no_follower_passes_over_a_commit_held_open(routers, books, raw) -> None:
    """While a transaction with a lower number is open no higher number can be seen; then both come, in order."""
    await routers[0].append(books.uuid, [make_document("first")])
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute("UPDATE collections SET seq = seq + 1, documents = documents + 1 WHERE uuid = $1", books.uuid)
    await raw.execute(
        """INSERT INTO documents (collection, id, seq, text, metadata, vector, content_hash, embedded_hash)
        SELECT number, 'held', seq, 'text', '{}', $2, 'c', 'e' FROM collections WHERE uuid = $1""",
        books.uuid,
        bytes(16),
    )
    later = asyncio.create_task(routers[1].append(books.uuid, [make_document("later")]))
    done, _ = await asyncio.wait([later], timeout=0.3)
    assert not done
    assert [op.seq for op in await log(routers[0], books)] == [1]
    await transaction.commit()
    assert (await later).seq == 3
    assert [(op.seq, op.id) for op in await log(routers[0], books)] == [(1, "first"), (2, "held"), (3, "later")]
    assert await routers[0].state(books.uuid) == CollectionState(3, 3)


async def test_a_commit_held_open_and_undone_leaves_no_gap(routers, books, raw) -> None:
    """Numbers that a transaction took and did not commit are taken by the next."""
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute("UPDATE collections SET seq = seq + 5 WHERE uuid = $1", books.uuid)
    later = asyncio.create_task(routers[1].append(books.uuid, [make_document("later")]))
    await asyncio.sleep(0.05)
    await transaction.rollback()
    assert (await later).seq == 1


async def test_followers_see_every_operation_of_interleaving_writers(routers, books) -> None:
    """Two routers with many writers each, on two collections: a follower on either sees each number, in order."""
    films = make_collection("films")
    await routers[0].create_collection(films)
    followers = [
        asyncio.create_task(follow(router, collection, 120)) for router in routers for collection in (books, films)
    ]

    async def writer(number: int) -> None:
        router, collection = routers[number % 2], (books, films)[number // 2 % 2]
        for turn in range(10):
            await router.append(collection.uuid, [make_document(f"{number}-{turn}-{n}") for n in range(number % 3 + 1)])

    await asyncio.gather(*(writer(number) for number in range(12)))
    for collection in (books, films):
        assert (await routers[0].state(collection.uuid)).seq == 120
    for seen in await asyncio.gather(*followers):
        assert [op.seq for op in seen] == list(range(1, 121))


async def test_batches_that_share_documents_in_other_orders_do_not_lock_each_other_up(routers, books) -> None:
    """Writers of the same ids in opposite orders all succeed."""
    documents = [make_document(f"d{n}") for n in range(50)]
    batches = [documents, documents[::-1]] * 6
    await asyncio.gather(*(routers[n % 2].append(books.uuid, batch) for n, batch in enumerate(batches)))
    assert await routers[0].state(books.uuid) == CollectionState(600, 50)


async def test_of_two_routers_one_keeps_the_receipt(routers, books) -> None:
    """A write repeated at another router under the same key is a conflict, and does nothing."""
    receipt = Receipt("key", b"digest", b"body")
    outcomes = await asyncio.gather(
        *(router.append(books.uuid, [make_document("a")], receipt=receipt) for router in routers),
        return_exceptions=True,
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict", "Written"]
    assert (await routers[0].state(books.uuid)).seq == 1
    assert await routers[1].find_receipt(books.uuid, "key") == Receipt("key", b"digest", b"body", 1)


async def test_news_comes_from_other_routers(routers, books) -> None:
    """What one router writes wakes the others, who then know the number without asking."""
    await routers[1].wait_for_news(0)
    waiting = asyncio.create_task(routers[1].wait_for_news(60))
    await asyncio.sleep(0)
    await routers[0].append(books.uuid, [make_document("a"), make_document("b")])
    async with asyncio.timeout(30):
        await waiting
    assert routers[1].heard_seq(books.uuid) == routers[0].heard_seq(books.uuid) == 2
    assert routers[1].heard_seq("nobody") == 0
    assert routers[1].heard_collections() == {books.uuid}


async def test_many_first_starts_make_one_schema(url: str, stack: AsyncExitStack) -> None:
    """Routers that start at once on an empty database make its tables once, and share one epoch."""
    ledgers = await asyncio.gather(*(PostgresLedger.open(url, pool_size=1) for _ in range(6)))
    for ledger in ledgers:
        stack.push_async_callback(ledger.aclose)
    assert len({ledger.epoch for ledger in ledgers}) == 1
    await ledgers[0].create_collection(make_collection())
    assert len(await ledgers[5].list_collections()) == 1


async def test_a_name_is_a_collections_or_an_aliases(routers, books) -> None:
    """Of a collection and an alias made at once under one name by two routers, one is refused."""
    for turn in range(5):
        outcomes = await asyncio.gather(
            routers[0].create_collection(make_collection(f"n{turn}")),
            routers[1].set_aliases({f"n{turn}": "books"}),
            return_exceptions=True,
        )
        assert sorted(type(outcome) for outcome in outcomes if outcome is not None) == [Conflict]


async def test_the_rows_of_a_deleted_collection_go(routers, books, raw) -> None:
    """After a deletion at one router the rows are freed, however many there were."""
    await routers[0].append(books.uuid, [make_document(f"d{n}") for n in range(3_000)])
    await routers[1].delete_collection(books.uuid)
    async with asyncio.timeout(30):
        while await raw.fetchval("SELECT (SELECT count(*) FROM documents) + (SELECT count(*) FROM collections)"):
            await asyncio.sleep(0.02)


async def test_a_role_that_may_only_read_and_write_rows_can_serve(url, routers, books, raw, stack) -> None:
    """Where the tables are there, a router needs no right to make any."""
    schema, role = Address.parse(url).schema, f"r_{Address.parse(url).schema}"
    await raw.execute(f"""
        CREATE ROLE {role} LOGIN;
        GRANT USAGE ON SCHEMA {schema} TO {role};
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};
    """)
    ledger = await PostgresLedger.open(url.replace("postgres@", f"{role}@", 1))
    stack.push_async_callback(ledger.aclose)
    assert ledger.epoch == routers[0].epoch
    await ledger.create_collection(make_collection("own"))
    assert (await ledger.append(books.uuid, [make_document("a")])).seq == 1


async def test_commits_are_synced_whatever_the_default(url, books, raw) -> None:
    """A database that acknowledges commits early by default does not do so for the ledger."""
    await raw.execute("ALTER ROLE postgres SET synchronous_commit = off")
    try:
        connection = await connect(Address.parse(url))
        assert await connection.fetchval("SHOW synchronous_commit") == "off"
        assert await insist_on_durability(connection) is False  # the tests' server runs with fsync=off
        assert await connection.fetchval("SHOW synchronous_commit") == "on"
        await connection.close()
    finally:
        await raw.execute("ALTER ROLE postgres RESET synchronous_commit")
