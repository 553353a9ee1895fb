"""`tercet migrate`: an embedded ledger, moved into a real PostgreSQL."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import apsw
import asyncpg
import numpy as np
import pytest

from services.search.ledger.postgres import PostgresLedger
from services.search.ledger.postgres.connections import Address
from services.search.ledger.sqlite import SqliteLedger
from services.search.offline.errors import OfflineError
from services.search.offline.migrate import Migrated, migrate
from services.search.ports import Collection, CollectionState, Receipt
from tests.contract.ledger_model import log, make_collection, make_document, same
from tests.postgres_server import PostgresServer, new_schema
from tests.search_process import SearchProcess

pytestmark = pytest.mark.slow

DOCUMENTS = 700
PATIENCE_S = 30.0

# Not a number with a payload, minus zero, the smallest number there is, infinity.
BITS = np.array([0x7FC0BEEF, 0x80000000, 0x00000001, 0xFF800000], dtype="<u4").view("<f4").astype(np.float32)


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    """A ledger of this test's own, that is not there yet."""
    return new_schema(postgres_server.url())


@pytest.fixture
async def raw(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection for plain SQL in that ledger's schema."""
    address = Address.parse(url)
    connection = await asyncpg.connect(address.dsn, server_settings={"search_path": address.schema})
    yield connection
    await connection.close()


@pytest.fixture
async def books(tmp_path: Path) -> Collection:
    """The collection `books` of a ledger in *tmp_path* that has something of everything."""
    ledger = await SqliteLedger.open(tmp_path / "ledger.db")
    try:
        gone, empty = make_collection("gone"), make_collection("empty", attributes={}, model=None, metric="l2")
        books = make_collection("bücher", attributes={"year": "number", "day": "date"}, language="german", shards=3)
        for collection in (gone, books, empty):
            await ledger.create_collection(collection)
        await ledger.append(gone.uuid, [make_document(f"g{number}") for number in range(600)])
        documents = [make_document(f"d{number}", f"text {number}", title=f"t{number}") for number in range(DOCUMENTS)]
        await ledger.append(books.uuid, documents, receipt=Receipt("key:first", b"asked", b'{"accepted": 700}'))
        odd = [
            make_document("nul \0 and 🦕", "text with \0 and \r\n\t\\.", title="\0", metadata={"ü": "\0", "list": []}),
            make_document("empty", "", title="", metadata={}),
            make_document("bits", "the vector's bits", vector=BITS),
        ]
        await ledger.append(books.uuid, odd, receipt=Receipt("key:🗝", b"\0\xff", b""))
        await ledger.delete(books.uuid, ["d0", "d1", "d2"])
        await ledger.trim(books.uuid, DOCUMENTS + 4)
        await ledger.append(books.uuid, [make_document("d5", "another text")])
        await ledger.set_aliases({"library": books.name, "nothing": "empty"})
        await ledger.delete_collection(gone.uuid)
    finally:
        await ledger.aclose()
    return books


def tercet(*arguments: object, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tercet.cli", *map(str, arguments)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def start(data_dir: Path, url: str) -> "subprocess.Popen[str]":
    """Start a migration and do not wait; it takes SIGINT though whoever started the tests in the background ignores it."""
    command = [sys.executable, "-m", "services.search.offline", "migrate", "--data-dir", str(data_dir)]
    environ = {**os.environ, "SEARCH_LEDGER_URL": url}
    return subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (nothing is locked that it needs)
    )


async def until_blocked(raw: asyncpg.Connection) -> None:
    """Wait until the migration waits for a table that is locked."""
    sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'receipts'::regclass AND NOT granted)"
    give_up_at = time.monotonic() + PATIENCE_S
    while not await raw.fetchval(sql):
        assert time.monotonic() < give_up_at
        await raw.execute("SELECT pg_sleep(0.02)")


async def check_same(data_dir: Path, url: str) -> None:
    """Assert that both ledgers hold the same, as the port shows it."""
    source, target = await SqliteLedger.open(data_dir / "ledger.db"), await PostgresLedger.open(url, pool_size=2)
    try:
        assert await target.list_collections() == await source.list_collections()
        assert await target.list_aliases() == await source.list_aliases()
        for collection in await source.list_collections():
            assert await target.state(collection.uuid) == await source.state(collection.uuid)
            pairs = zip(await log(source, collection), await log(target, collection), strict=True)
            for there, here in pairs:
                assert (there.seq, there.id) == (here.seq, here.id)
                if there.document is None or here.document is None:
                    assert there.document is here.document
                else:
                    assert same(there.document, here.document)
            for key in ("key:first", "key:🗝", "key:none"):
                assert await target.find_receipt(collection.uuid, key) == await source.find_receipt(
                    collection.uuid, key
                )
    finally:
        await source.aclose()
        await target.aclose()


async def test_everything_arrives_as_it_was(books, tmp_path, url, raw) -> None:
    """Collections, aliases, every operation with its bits, receipts with their age; the embedded ledger is not touched."""
    before = (tmp_path / "ledger.db").read_bytes()
    done = await migrate(tmp_path, url)
    assert (tmp_path / "ledger.db").read_bytes() == before
    assert [(moved.name, moved.documents, moved.seq, moved.receipts) for moved in done.collections] == [
        ("bücher", DOCUMENTS, DOCUMENTS + 7, 2),
        ("empty", 0, 0, 0),
    ]
    assert (done.aliases, done.already, done.durable) == (2, False, False)  # The tests' PostgreSQL has fsync off.
    with apsw.Connection(str(tmp_path / "ledger.db"), flags=apsw.SQLITE_OPEN_READONLY) as source:
        ages = {str(key): float(at) for key, at in source.execute("SELECT key, written_at FROM receipts WHERE seq > 0")}
    kept = await raw.fetch("SELECT key, extract(epoch FROM kept_at)::float8 FROM receipts")
    assert {key.decode(): at for key, at in kept} == pytest.approx(ages, abs=1e-5)
    await check_same(tmp_path, url)


async def test_it_is_written_to_as_if_it_had_always_been_there(books, tmp_path, url) -> None:
    """The next operation has the next number, and a write under a kept idempotency key is refused."""
    await migrate(tmp_path, url)
    ledger = await PostgresLedger.open(url, pool_size=2)
    try:
        written = await ledger.append(books.uuid, [make_document("d7", "new"), make_document("more")])
        assert written.seq == DOCUMENTS + 9
        assert await ledger.state(books.uuid) == CollectionState(DOCUMENTS + 9, DOCUMENTS + 1, DOCUMENTS + 4)
        assert (await ledger.find_collection("library")) == books
        assert await ledger.trim(books.uuid, DOCUMENTS + 9) == 2
    finally:
        await ledger.aclose()


async def test_a_killed_migration_leaves_nothing_and_is_made_again(books, tmp_path, url, raw) -> None:
    """Killed with all documents sent, none is seen, then or later; the same command succeeds, as services wait for it."""
    ledger = await PostgresLedger.open(url, pool_size=2)
    lock = raw.transaction()
    await lock.start()
    await raw.execute("LOCK TABLE receipts")
    try:
        process = start(tmp_path, url)
        await until_blocked(raw)
        assert await ledger.list_collections() == []
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert await ledger.list_collections() == []
    finally:
        await lock.rollback()
    again = start(tmp_path, url)
    out, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, err
    assert "migrated: " in out
    assert [collection.name for collection in await ledger.list_collections()] == ["bücher", "empty"]
    await ledger.aclose()
    await check_same(tmp_path, url)


async def test_an_interrupted_one_ends_at_once(books, tmp_path, url, raw) -> None:
    """Ctrl-C leaves nothing behind, says nothing and ends with 130."""
    await (await PostgresLedger.open(url, pool_size=2)).aclose()
    async with raw.transaction():
        await raw.execute("LOCK TABLE receipts")
        process = start(tmp_path, url)
        await until_blocked(raw)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out, err) == (130, "", "")
    assert await raw.fetchval("SELECT count(*) FROM documents") == 0
    assert not (await migrate(tmp_path, url)).already


async def test_a_service_that_starts_meanwhile_waits_for_all_of_it(books, tmp_path, url, raw) -> None:
    """A ledger opened during a migration is open when that has ended, and has everything."""
    await (await PostgresLedger.open(url, pool_size=2)).aclose()
    lock = raw.transaction()
    await lock.start()
    await raw.execute("LOCK TABLE receipts")
    try:
        process = start(tmp_path, url)
        await until_blocked(raw)
        opening = asyncio.create_task(PostgresLedger.open(url, pool_size=2))
        done, _ = await asyncio.wait([opening], timeout=0.3)
        assert not done
    finally:
        await lock.rollback()
    ledger = await opening
    try:
        assert [collection.name for collection in await ledger.list_collections()] == ["bücher", "empty"]
    finally:
        await ledger.aclose()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


async def test_a_new_epoch_begins(books, tmp_path, url) -> None:
    """Nothing is shared with what this database, or the embedded ledger, was before."""
    ledger = await PostgresLedger.open(url, pool_size=2)
    before = ledger.epoch
    await ledger.aclose()
    embedded = await SqliteLedger.open(tmp_path / "ledger.db")
    await embedded.aclose()
    await migrate(tmp_path, url)
    ledger = await PostgresLedger.open(url, pool_size=2)
    try:
        assert ledger.epoch not in (before, embedded.epoch)
        assert await ledger.shares_history(books.uuid, ledger.epoch, DOCUMENTS + 7)
        assert not await ledger.shares_history(books.uuid, before, 1)
        assert not await ledger.shares_history(books.uuid, embedded.epoch, 1)
    finally:
        await ledger.aclose()


async def test_the_second_time_there_is_nothing_to_do(books, tmp_path, url) -> None:
    """As after a lost connection at the end: the same content is recognised, compared, and left alone."""
    first = await migrate(tmp_path, url)
    process = start(tmp_path, url)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "nothing to do: " in out
    assert first.collections[0].digest in out
    assert await migrate(tmp_path, url) == Migrated(first.place, first.collections, 2, True, first.durable)


@pytest.mark.parametrize("what", ["another", "written", "same names, other text"])
async def test_a_ledger_that_is_not_empty_is_refused(books, tmp_path, url, raw, what: str) -> None:
    """It stays as it is, and the message names what is there."""
    if what == "another":
        ledger = await PostgresLedger.open(url, pool_size=2)
        await ledger.create_collection(make_collection("bücher"))
        await ledger.aclose()
    else:
        await migrate(tmp_path, url)
        column = "seq = 9999" if what == "written" else "text = 'x'"
        await raw.execute(f"UPDATE documents SET {column} WHERE id = 'd9'")
    rows = "SELECT count(*), max(seq), min(text) FROM documents"
    before = await raw.fetch(rows), await raw.fetch("SELECT * FROM collections")
    with pytest.raises(OfflineError, match=r"not empty.*'bücher' \(\d+ documents\)"):
        await migrate(tmp_path, url)
    assert (await raw.fetch(rows), await raw.fetch("SELECT * FROM collections")) == before


async def test_what_arrives_otherwise_than_sent_is_not_kept(books, tmp_path, url, raw) -> None:
    """One bit of one vector that the database changes is found, and the whole migration undone."""
    await (await PostgresLedger.open(url, pool_size=2)).aclose()
    await raw.execute("""
        CREATE FUNCTION flip() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.vector = set_bit(NEW.vector, 77, 1 - get_bit(NEW.vector, 77)); RETURN NEW; END $$;
        CREATE TRIGGER flip BEFORE INSERT ON documents FOR EACH ROW WHEN (NEW.id = 'd333') EXECUTE FUNCTION flip();
    """)
    with pytest.raises(OfflineError, match="'bücher' differs"):
        await migrate(tmp_path, url)
    assert await raw.fetchval("SELECT count(*) FROM collections") == 0
    await raw.execute("DROP TRIGGER flip ON documents")
    await migrate(tmp_path, url)
    await check_same(tmp_path, url)


async def test_a_role_that_may_only_read_and_write_rows_is_enough(books, tmp_path, url, raw, postgres_server) -> None:
    """Where the tables are there already, as a service's first start by another role left them."""
    await (await PostgresLedger.open(url, pool_size=2)).aclose()
    schema = Address.parse(url).schema
    await raw.execute(f"""
        DO $$ BEGIN CREATE ROLE clerk LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
        GRANT USAGE ON SCHEMA {schema} TO clerk;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO clerk;
    """)
    await migrate(tmp_path, url.replace("postgres@", "clerk@"))
    await check_same(tmp_path, url)


async def test_one_that_is_damaged_is_refused(books, tmp_path, url, raw) -> None:
    """A document that the embedded ledger counts and does not have ends the migration, and nothing is there."""
    with apsw.Connection(str(tmp_path / "ledger.db")) as connection:
        connection.execute("DELETE FROM documents WHERE id = 'd50'")
    with pytest.raises(OfflineError, match=r"damaged.*should have 700 documents.*has 699"):
        await migrate(tmp_path, url)
    assert await raw.fetchval("SELECT to_regclass('collections')") is None


async def test_another_versions_ledger_is_refused(books, tmp_path, url) -> None:
    """It is for the Tercet that wrote it, or to be converted by a start of the service."""
    for version, message in ((99, "newer Tercet"), (1, "older Tercet")):
        with apsw.Connection(str(tmp_path / "ledger.db")) as connection:
            connection.pragma("user_version", version)
        with pytest.raises(OfflineError, match=message):
            await migrate(tmp_path, url)


async def test_a_server_that_goes_away_is_told(books, tmp_path, url, postgres_server, raw) -> None:
    """One plain message, and the same command succeeds when it is back."""
    await (await PostgresLedger.open(url, pool_size=2)).aclose()
    lock = raw.transaction()
    await lock.start()
    await raw.execute("LOCK TABLE receipts")
    process = start(tmp_path, url)
    await until_blocked(raw)
    postgres_server.crash()
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        postgres_server.start()
    assert (process.returncode, out) == (1, "")
    assert err.startswith("tercet: The ledger ")
    assert "Traceback" not in err
    assert not (await migrate(tmp_path, url)).already
    await check_same(tmp_path, url)


@pytest.mark.parametrize(
    ("to", "data_dir", "message"),
    [
        ("mysql://user:secret@host/db", ".", "postgresql://user:password@host/database"),
        ("postgresql://postgres@127.0.0.1:1/postgres", ".", "it cannot be reached"),
        ("postgresql://postgres:secret@127.0.0.1:port/db", ".", "127.0.0.1:port/db"),
        ("{url}&schema=Not-A-Name", ".", "schema"),
        ("{server}/nothing", ".", "there is no such database"),
        ("{url}", "nowhere", "There is no ledger.db in "),
        ("{url}", "stack", "--data-dir "),
    ],
)
async def test_trouble_is_told_plainly(books, tmp_path, url, postgres_server, to, data_dir, message) -> None:
    """The message says what is wrong, and no password."""
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "search").symlink_to(tmp_path)
    given = to.format(url=url, server=postgres_server.url("")[:-1])
    with pytest.raises(OfflineError) as trouble:
        await migrate(tmp_path / data_dir, given)
    assert message in str(trouble.value)
    assert "secret" not in str(trouble.value)


def vector(number: int) -> list[float]:
    """Return a vector that is nearest to itself among those of all other numbers."""
    return [1.0, number / 100, (number * 7 % 13) / 10, (number * 5 % 11) / 10]


def question(**search: Any) -> dict[str, Any]:
    """Return a search of whole answers by retrieval alone."""
    return {"collection": "all", "k": 20, "rerank": False, "cache": False, "require": {"full": True}, **search}


def answers(service: SearchProcess) -> list[Any]:
    """Return hits with their scores and stages, for questions of every mode and a filter."""
    searches = [
        question(query="word17 or others", mode="lexical"),
        question(query_vector=vector(42), mode="dense"),
        question(query="word9 word21 third", query_vector=vector(7), mode="hybrid"),
        question(query_vector=vector(100), mode="dense", filter={"third": {"$eq": 1}}),
    ]
    return [service.ask("POST", "/search", search)["hits"] for search in searches]


def test_a_service_on_it_gives_the_same_answers(tmp_path: Path, url: str) -> None:
    """Same hits and scores from a fresh directory and beside the old shards; while a service runs nothing is moved."""
    data = tmp_path / "data"
    service = SearchProcess(data)
    service.start()
    documents = [
        {"id": f"d{n}", "text": f"word{n} among others", "vector": vector(n), "metadata": {"third": n % 3}}
        for n in range(300)
    ]
    key = {"Idempotency-Key": "once"}
    write = {"documents": [{"id": "d300", "text": "written under a key", "vector": vector(300)}]}
    try:
        service.ask("POST", "/collections", {"name": "c", "dim": 4, "shards": 2})
        service.ask("POST", "/collections/c/documents", {"documents": documents})
        first = service.ask("POST", "/collections/c/documents", write, headers=key)
        service.ask("POST", "/aliases", {"changes": {"all": "c"}})
        expected = answers(service)
        refused = tercet("migrate", "--to", url, "--data-dir", data)
        assert refused.returncode == 1
        assert refused.stderr.startswith("tercet: ")
        assert f"in use by process {service.pid}" in refused.stderr
    finally:
        service.stop()
    assert all(expected)
    done = tercet("migrate", "--data-dir", data, SEARCH_LEDGER_URL=url)
    assert done.returncode == 0, done.stderr
    assert "c: 301 documents, last operation 301, 1 receipt, digest " in done.stdout
    for directory in (tmp_path / "fresh", data):
        service = SearchProcess(directory, SEARCH_LEDGER_URL=url)
        service.start()
        try:
            again = service.ask("POST", "/collections/c/documents", write, headers=key)
            assert (again["seq"], again["accepted"]) == (first["seq"], first["accepted"])
            service.ask("POST", "/search", question(mode="dense", query_vector=vector(1), min_seq=first["seq"]))
            assert answers(service) == expected
            for shards in service.ask("POST", "/collections/c/audit")["hosts"].values():
                assert not any(ids for shard in shards for ids in shard["differences"].values())
        finally:
            service.stop()
