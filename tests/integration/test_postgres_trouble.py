"""A PostgreSQL that stops, crashes, refuses, loses answers, or comes back with an earlier state."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from urllib.parse import urlsplit

import asyncpg
import pytest

from services.common.errors import Conflict, Internal, InvalidInput, NotReady, TercetError, TooLarge, Unavailable
from services.search.ledger.postgres import PostgresLedger
from services.search.ledger.postgres.connections import Address
from services.search.ledger.postgres.failures import explain
from services.search.ports import Collection, Receipt
from tests.contract.ledger_contract import log, make_collection, make_document
from tests.postgres_server import PostgresServer, new_schema

Open = Callable[..., "asyncio.Future[PostgresLedger]"]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    """A ledger of this test's own."""
    return new_schema(postgres_server.url())


@pytest.fixture
def opened(url: str, stack: AsyncExitStack) -> Open:
    """Opens the ledger, or that of another URL, until the test ends."""

    async def open_(where: str = url) -> PostgresLedger:
        ledger = await PostgresLedger.open(where, pool_size=4)
        stack.push_async_callback(ledger.aclose)
        return ledger

    return open_


async def administer(server: PostgresServer, *statements: str) -> None:
    """Run statements outside of any transaction, in the database that no ledger is in."""
    connection = await asyncpg.connect(server.url("template1"))
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def filled(ledger: PostgresLedger, documents: int) -> Collection:
    """Make a collection of so many operations."""
    books = make_collection()
    await ledger.create_collection(books)
    await ledger.append(books.uuid, [make_document(f"d{n}") for n in range(documents)])
    return books


@pytest.mark.parametrize("end", ["stop", "crash"])
async def test_a_restart_costs_writers_a_retry_and_nothing_else(postgres_server, opened, end: str) -> None:
    """Writers and readers get Unavailable with a time to retry after, and go on by themselves; nothing is lost or mixed."""
    routers = [await opened(), await opened()]
    books = await filled(routers[0], 1)
    before, acknowledged, failures, ended = routers[0].epoch, [], [], asyncio.Event()

    async def insist(call) -> object:
        while True:
            try:
                return await call()
            except Unavailable as error:
                failures.append(error)
                await asyncio.sleep(0.02)

    async def writer(number: int) -> None:
        turn = 0
        while not ended.is_set():
            batch = [make_document(f"{number}-{turn}-{n}") for n in range(3)]
            acknowledged.append(await insist(lambda: routers[number % 2].append(books.uuid, batch)))  # noqa: B023
            turn += 1

    async def reader() -> None:
        while not ended.is_set():
            await insist(lambda: routers[0].operations_after(books.uuid, 0, limit=10))

    work = [*(asyncio.create_task(writer(number)) for number in range(4)), asyncio.create_task(reader())]
    await asyncio.sleep(0.1)
    await asyncio.to_thread(getattr(postgres_server, end))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(postgres_server.start)
    done_before = len(acknowledged)
    while len(acknowledged) < done_before + 20:
        await asyncio.sleep(0.01)
    ended.set()
    await asyncio.gather(*work)
    assert failures
    assert all(failure.retry_after_s == 1 for failure in failures)
    operations = await log(routers[1], books)
    assert len({op.seq for op in operations}) == len(operations)
    last = max(written.seq for written in acknowledged)
    assert operations[-1].seq == last == (await routers[0].state(books.uuid)).seq
    ids = {op.id for op in operations}
    assert all(f"{id_.rsplit('-', 1)[0]}-{n}" in ids for id_ in ids - {"d0"} for n in range(3))
    assert {op.seq for op in operations} >= {written.seq for written in acknowledged}
    assert routers[0].epoch == routers[1].epoch != before
    assert await routers[0].shares_history(books.uuid, before, acknowledged[0].seq)
    assert not await routers[0].shares_history(books.uuid, before, last)
    assert await routers[0].shares_history(books.uuid, routers[0].epoch, last)


async def test_news_come_again_after_a_restart(postgres_server, opened) -> None:
    """The listening connection returns by itself; that it does is news, and so is what is then announced."""
    routers = [await opened(), await opened()]
    books = await filled(routers[0], 1)
    await routers[1].wait_for_news(0)
    waiting = asyncio.create_task(routers[1].wait_for_news(60))
    postgres_server.stop()
    postgres_server.start()
    async with asyncio.timeout(30):
        await waiting
        while routers[1].heard_seq(books.uuid) < 2:  # it has read nothing: what it knows was announced
            await filled_more(routers[0], books, 1)
            await asyncio.sleep(0.02)


async def test_a_server_that_is_down_is_unavailable(postgres_server, url, opened) -> None:
    """While it is down calls and openings say so, without the password; once it is up the same ledger works."""
    ledger = await opened()
    books = await filled(ledger, 1)
    secret = url.replace("postgres@", "postgres:secret@", 1)
    postgres_server.stop()
    try:
        for call in (ledger.state(books.uuid), ledger.append(books.uuid, []), PostgresLedger.open(secret)):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.retry_after_s == 1
            assert "127.0.0.1" in caught.value.message
            assert "secret" not in caught.value.message
    finally:
        postgres_server.start()
    assert (await ledger.append(books.uuid, [make_document("a")])).seq == 2


async def test_a_data_directory_put_back_is_noticed(postgres_server, opened, tmp_path) -> None:
    """After a copy of the files is put back, what was derived up to the copy holds; what came later does not, ever."""
    ledger = await opened()
    books = await filled(ledger, 5)
    copied = ledger.epoch
    copy = postgres_server.data.with_name("copy")
    postgres_server.stop()
    postgres_server.copy(postgres_server.data, copy)
    postgres_server.start()
    await filled_more(ledger, books, 5)
    lost = ledger.epoch
    await ledger.aclose()
    postgres_server.stop()
    shutil.rmtree(postgres_server.data)
    postgres_server.copy(copy, postgres_server.data)
    postgres_server.start()
    shutil.rmtree(copy)
    ledger = await opened()
    for more in (0, 20):
        await filled_more(ledger, books, more)
        assert await ledger.shares_history(books.uuid, copied, 5)
        assert not await ledger.shares_history(books.uuid, copied, 6)
        assert not await ledger.shares_history(books.uuid, lost, 1)
        assert await ledger.shares_history(books.uuid, ledger.epoch, 5 + more)
        assert not await ledger.shares_history(books.uuid, ledger.epoch, 6 + more)


async def filled_more(ledger: PostgresLedger, books: Collection, documents: int) -> None:
    """Append so many documents, trying again while the server has only just come back."""
    while True:
        try:
            await ledger.append(books.uuid, [make_document(f"more{n}") for n in range(documents)])
        except Unavailable:
            await asyncio.sleep(0.02)
        else:
            return


async def test_a_copied_database_goes_its_own_way(postgres_server, opened, stack) -> None:
    """A database made from another as template shares its history up to then, and nothing later."""
    await administer(postgres_server, "CREATE DATABASE one")
    stack.push_async_callback(administer, postgres_server, "DROP DATABASE one", "DROP DATABASE IF EXISTS two")
    one = await PostgresLedger.open(postgres_server.url("one"))
    books = await filled(one, 3)
    epoch = one.epoch
    await one.aclose()
    await administer(postgres_server, "CREATE DATABASE two TEMPLATE one")
    ledgers = [await PostgresLedger.open(postgres_server.url(name)) for name in ("one", "two")]
    try:
        for ledger in ledgers:
            await filled_more(ledger, books, 4)
        assert ledgers[0].epoch == epoch != ledgers[1].epoch
        assert await ledgers[0].shares_history(books.uuid, epoch, 7)
        assert await ledgers[1].shares_history(books.uuid, epoch, 3)
        assert not await ledgers[1].shares_history(books.uuid, epoch, 7)
        assert not await ledgers[0].shares_history(books.uuid, ledgers[1].epoch, 1)
    finally:
        for ledger in ledgers:
            await ledger.aclose()


async def test_a_dump_restored_into_the_same_database_is_noticed(postgres_server, url, opened) -> None:
    """Tables dropped and made again from a dump are another stretch of history, though the server never stopped."""
    schema, dump = Address.parse(url).schema, postgres_server.data.with_name("dump")
    ledger = await opened()
    books = await filled(ledger, 3)
    epoch = ledger.epoch
    postgres_server.run("pg_dump", "-Fc", "-n", schema, "-f", str(dump), postgres_server.url())
    await filled_more(ledger, books, 4)
    await ledger.aclose()
    postgres_server.run("pg_restore", "--clean", "-d", postgres_server.url(), str(dump))
    ledger = await opened()
    await filled_more(ledger, books, 9)
    assert await ledger.shares_history(books.uuid, epoch, 3)
    assert not await ledger.shares_history(books.uuid, epoch, 7)


async def test_a_read_only_server_still_serves_readers(postgres_server, opened) -> None:
    """Writes are Unavailable while the database takes none, reads go on, and writes work again afterwards."""
    ledger = await opened()
    books = await filled(ledger, 1)
    end_sessions = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'tercet'"
    await administer(postgres_server, "ALTER DATABASE postgres SET default_transaction_read_only = on", end_sessions)
    try:
        message = ""
        while "read only" not in message:  # the first call may meet a connection that has just ended
            with pytest.raises(Unavailable) as caught:
                await ledger.append(books.uuid, [make_document("a")])
            message = caught.value.message
        assert [op.seq for op in await log(ledger, books)] == [1]
    finally:
        await administer(postgres_server, "ALTER DATABASE postgres RESET default_transaction_read_only", end_sessions)
    await filled_more(ledger, books, 1)
    assert (await ledger.state(books.uuid)).seq == 2


class CuttingProxy:
    """Passes bytes between clients and a server; a client that sent *word* never hears how its next COMMIT went."""

    def __init__(self, server_port: int, word: bytes) -> None:
        self._server_port = server_port
        self._word = word

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._pass, "127.0.0.1", 0, family=socket.AF_INET)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
        answers = asyncio.create_task(self._copy(there, writer))
        sent = b""
        while data := await reader.read(65536):
            sent += data
            cutting = self._word in sent and b"COMMIT;" in data
            if cutting:
                answers.cancel()
                await asyncio.wait([answers])
            back.write(data)
            if cutting:
                await there.read(1)  # so the server has done it
                break
        answers.cancel()
        writer.transport.abort()
        back.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()


async def test_a_commit_whose_answer_is_lost_may_be_repeated(url, opened) -> None:
    """When the connection goes amid COMMIT the caller is told that nobody knows; its receipt tells at the next try."""
    direct = await opened()
    books = await filled(direct, 1)
    port = urlsplit(url).port
    server = await CuttingProxy(port, b"the-lost-key").serve()
    async with server:
        ledger = await PostgresLedger.open(url.replace(f":{port}/", f":{server.sockets[0].getsockname()[1]}/"))
        receipt = Receipt("the-lost-key", b"digest", b"body")
        with pytest.raises(Unavailable, match="not known"):
            await ledger.append(books.uuid, [make_document("a")], receipt=receipt)
        with pytest.raises(Conflict):
            await ledger.append(books.uuid, [make_document("a")], receipt=receipt)
        assert [op.seq for op in await log(direct, books)] == [1, 2]
        await ledger.aclose()


async def test_too_few_connections_are_unavailable(postgres_server, url, opened) -> None:
    """A server without a connection left is Unavailable, with the word of how to mend it."""
    ledger = await opened()
    books = await filled(ledger, 1)
    others = []
    try:
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                others.append(await asyncpg.connect(postgres_server.url()))
        with pytest.raises(Unavailable, match="max_connections"):
            await PostgresLedger.open(url)
        assert (await ledger.state(books.uuid)).seq == 1
    finally:
        for connection in others:
            await connection.close()


async def test_a_newer_schema_is_refused(url, opened) -> None:
    """A schema that a later version wrote is left alone, with an error that says so."""
    await opened()
    address = Address.parse(url)
    connection = await asyncpg.connect(address.dsn)
    await connection.execute(f"INSERT INTO {address.schema}.migrations (version) VALUES (99)")
    with pytest.raises(NotReady, match="newer"):
        await PostgresLedger.open(url)
    await connection.close()


def test_a_schemas_name_is_plain() -> None:
    """What could not stand in SQL unquoted is refused; the default is `tercet`."""
    with pytest.raises(InvalidInput, match="schema"):
        Address.parse('postgresql://host/db?schema=a";drop')
    assert Address.parse("postgresql://user:pw@host/db").place == "host/db (schema tercet)"


@pytest.mark.parametrize(
    ("raised", "meant"),
    [
        (asyncpg.DiskFullError("no space"), Unavailable),
        (asyncpg.TooManyConnectionsError("too many"), Unavailable),
        (asyncpg.LockNotAvailableError("locked"), Unavailable),
        (asyncpg.QueryCanceledError("slow"), Unavailable),
        (asyncpg.AdminShutdownError("shutdown"), Unavailable),
        (asyncpg.CannotConnectNowError("starting"), Unavailable),
        (asyncpg.ReadOnlySQLTransactionError("standby"), Unavailable),
        (asyncpg.DeadlockDetectedError("deadlock"), Unavailable),
        (asyncpg.InvalidPasswordError("password"), Unavailable),
        (asyncpg.InterfaceError("connection is closed"), Unavailable),
        (ConnectionRefusedError("refused"), Unavailable),
        (TimeoutError(), Unavailable),
        (asyncpg.UniqueViolationError("twice"), Conflict),
        (asyncpg.ProgramLimitExceededError("index row"), TooLarge),
        (asyncpg.DataCorruptedError("checksum"), Internal),
        (asyncpg.UndefinedTableError("documents"), Internal),
        (ValueError("ours"), Internal),
    ],
)
def test_errors_become_ours(raised: Exception, meant: type[TercetError]) -> None:
    """Each error of PostgreSQL, the driver and the network has a meaning, and what may pass has a time to retry after."""
    error = explain(raised, "host/db", writing=True)
    assert type(error) is meant
    assert error.retry_after_s == (1.0 if meant is Unavailable else None)
    assert "host/db" in error.message or meant in (TooLarge,)
