"""The ledgers that ship, each held to the contract, and what only the embedded one promises."""

import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from services.common.errors import Conflict, Internal, NotReady, Unavailable
from services.search.ledger import epochs, rows
from services.search.ledger.schema import MIGRATIONS
from services.search.ledger.sqlite import SqliteLedger
from services.search.ports import Collection, CollectionState, Ledger, Receipt, Written
from tests.contract.ledger_contract import LedgerContract
from tests.contract.ledger_model import log, make_collection, make_document, same

ROOT = Path(__file__).parents[2]

OPEN_IN_ANOTHER_PROCESS = """
import asyncio, sys
from pathlib import Path
from services.common.errors import Conflict
from services.search.ledger.sqlite import SqliteLedger

async def main():
    try:
        await SqliteLedger.open(Path(sys.argv[1]))
    except Conflict as error:
        print(error.message)

asyncio.run(main())
"""

APPEND_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from services.search.ledger.sqlite import SqliteLedger
from tests.contract.ledger_model import make_document

async def writer(ledger, uuid, number):
    turn = 0
    while True:
        batch = [make_document(f"{number}-{turn}-{n}") for n in range(3)]
        written = await ledger.append(uuid, batch)
        print(f"{number}-{turn} {written.seq}", flush=True)
        turn += 1

async def main():
    ledger = await SqliteLedger.open(Path(sys.argv[1]))
    await asyncio.gather(*(writer(ledger, sys.argv[2], number) for number in range(4)))

asyncio.run(main())
"""


def ledger_path(place: Path) -> Path:
    """Return where the tests keep the ledger of *place*."""
    return place / "data" / "ledger.sqlite"


class TestSqliteLedger(LedgerContract):
    """The embedded ledger."""

    async def open(self, place: Path) -> Ledger:
        return await SqliteLedger.open(ledger_path(place))

    async def test_a_second_process_is_refused(self, ledger: Ledger, tmp_path: Path) -> None:
        """Another process that opens the file is told the path and the process that holds it."""
        path = ledger_path(tmp_path)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OPEN_IN_ANOTHER_PROCESS, str(path), cwd=ROOT, stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert str(path) in output.decode()
        assert f"process {os.getpid()}:" in output.decode()

    async def test_a_second_opening_in_this_process_is_refused(self, ledger: Ledger, tmp_path: Path) -> None:
        """The same process cannot open the file twice, and the first opening goes on."""
        with pytest.raises(Conflict):
            await SqliteLedger.open(ledger_path(tmp_path))
        assert await ledger.list_collections() == []

    @pytest.mark.slow
    @pytest.mark.parametrize("acknowledgements", [1, 40, 250])
    async def test_a_killed_process_loses_nothing_acknowledged(self, tmp_path: Path, acknowledgements: int) -> None:
        """After SIGKILL amid appends every acknowledged batch is there, and each unacknowledged one whole or absent."""
        collection = make_collection()
        async with self.opened(tmp_path) as ledger:
            await ledger.create_collection(collection)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            APPEND_FOR_EVER,
            str(ledger_path(tmp_path)),
            collection.uuid,
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        lines = [await process.stdout.readline() for _ in range(acknowledgements)]
        process.send_signal(signal.SIGKILL)
        rest, _ = await process.communicate()
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
        async with self.opened(tmp_path) as ledger:
            operations = await log(ledger, collection)
            assert [op.seq for op in operations] == list(range(1, len(operations) + 1))
            assert await ledger.state(collection.uuid) == CollectionState(len(operations), len(operations))
            by_id = {op.id: op.seq for op in operations}
            for line in lines:
                batch, seq = line.decode().split()
                assert [by_id[f"{batch}-{n}"] for n in range(3)] == [int(seq) - 2, int(seq) - 1, int(seq)]
            assert all(f"{id_.rsplit('-', 1)[0]}-{n}" in by_id for id_ in by_id for n in range(3))

    async def test_a_write_the_disk_refuses_leaves_nothing(self, ledger: Ledger, tmp_path: Path) -> None:
        """When the disk takes no more, the append fails as Unavailable, leaves nothing, and later ones succeed."""
        books = make_collection()
        await ledger.create_collection(books)
        await ledger.append(books.uuid, [make_document("before")])
        wal = ledger_path(tmp_path).with_name("ledger.sqlite-wal")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 100_000, before[1]))
        try:
            with pytest.raises(Unavailable, match=r"ledger\.sqlite"):
                await ledger.append(books.uuid, [make_document(f"d{n}", "long " * 1000) for n in range(100)])
            assert await ledger.state(books.uuid) == CollectionState(1, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (await ledger.append(books.uuid, [make_document("after")])).seq == 2
        assert [op.id for op in await log(ledger, books)] == ["before", "after"]

    async def test_a_newer_schema_is_refused(self, ledger: Ledger, tmp_path: Path) -> None:
        """A file that a later version wrote is left alone, with an error that says so."""
        await ledger.aclose()
        with sqlite3.connect(ledger_path(tmp_path)) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        with pytest.raises(NotReady, match="newer"):
            await self.open(tmp_path)
        with sqlite3.connect(ledger_path(tmp_path)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (99,)
        connection.close()

    async def test_a_file_that_is_no_ledger_is_refused(self, tmp_path: Path) -> None:
        """Opening some other file is an Internal error that says to restore it, and gives the claim on it up."""
        path = ledger_path(tmp_path)
        path.parent.mkdir()
        path.write_bytes(b"no database " * 1000)
        for _ in range(2):
            with pytest.raises(Internal, match="restore"):
                await SqliteLedger.open(path)

    async def test_an_unusable_directory_is_unavailable(self, tmp_path: Path) -> None:
        """Where the data directory cannot be made the error names the path."""
        (tmp_path / "data").write_text("a file, not a directory")
        with pytest.raises(Unavailable, match="data"):
            await self.open(tmp_path)

    async def test_space_of_a_deleted_collection_is_freed_after_a_restart(self, tmp_path: Path) -> None:
        """Rows of a dropped collection that were not cleared before the end are cleared at the next start."""
        books = make_collection()
        async with self.opened(tmp_path) as ledger:
            await ledger.create_collection(books)
            await ledger.append(books.uuid, [make_document(f"d{n}") for n in range(2000)])
            await ledger.delete_collection(books.uuid)
        rows = -1
        for _ in range(50):
            async with self.opened(tmp_path):
                await asyncio.sleep(0.05)
            with sqlite3.connect(ledger_path(tmp_path)) as connection:
                (rows,) = connection.execute(
                    "SELECT (SELECT count(*) FROM documents) + (SELECT count(*) FROM collections)"
                ).fetchone()
            connection.close()
            if rows == 0:
                break
        assert rows == 0

    async def test_opening_survives_cancellation(self, tmp_path: Path) -> None:
        """An opening that is cancelled, however far it had come, gives the file up again."""
        for delay_s in (0, 0.0005, 0.001, 0.002, 0.005):
            task = asyncio.create_task(self.open(tmp_path))
            await asyncio.sleep(delay_s)
            if task.cancel():
                await asyncio.wait([task])
            if not task.cancelled():
                await task.result().aclose()
            async with asyncio.timeout(5):
                await self.open_when_free(tmp_path)

    async def open_when_free(self, place: Path) -> None:
        """Open and close the ledger once nobody holds it."""
        while True:
            try:
                ledger = await self.open(place)
            except Conflict:
                await asyncio.sleep(0.01)
            else:
                return await ledger.aclose()

    # --- history

    async def test_every_opening_begins_another_epoch(self, tmp_path: Path) -> None:
        """Each opening has a token of its own, and all former ones are known."""
        tokens = []
        for _ in range(3):
            async with self.opened(tmp_path) as ledger:
                assert ledger.epoch not in tokens
                tokens.append(ledger.epoch)

    async def test_a_copy_put_back_is_noticed(self, tmp_path: Path, books: Collection, reopen) -> None:
        """What was read before an older copy came back is not shared, even when the copy has grown past it again."""
        ledger = await reopen()
        await ledger.append(books.uuid, [make_document(f"d{n}") for n in range(5)])
        kept = ledger.epoch
        copy = tmp_path / "copy.sqlite"
        with closing(sqlite3.connect(ledger_path(tmp_path))) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        await ledger.append(books.uuid, [make_document("lost")])
        ledger = await reopen()
        await ledger.append(books.uuid, [make_document("lost too")])
        lost = ledger.epoch
        await ledger.aclose()
        for path in ledger_path(tmp_path).parent.glob("ledger.sqlite*"):
            path.unlink()
        shutil.copyfile(copy, ledger_path(tmp_path))
        async with self.opened(tmp_path) as ledger:
            for _ in range(2):
                assert await ledger.shares_history(books.uuid, kept, 5)
                assert not await ledger.shares_history(books.uuid, kept, 6)
                assert not await ledger.shares_history(books.uuid, lost, 7)
                assert not await ledger.shares_history(books.uuid, lost, 5)
                await ledger.append(books.uuid, [make_document(f"else {n}") for n in range(5)])

    async def test_old_epochs_are_forgotten(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond the newest epochs a token is unknown; where collections stood is still right for those that are kept."""
        monkeypatch.setattr(epochs, "MAX_EPOCHS", 3)
        books, still = make_collection(), make_collection("still")
        begun: list[tuple[str, int]] = []
        for turn in range(7):
            async with self.opened(tmp_path) as ledger:
                if turn == 0:
                    await ledger.create_collection(books)
                    await ledger.create_collection(still)
                    await ledger.append(still.uuid, [make_document("a")])
                begun.append((ledger.epoch, (await ledger.append(books.uuid, [make_document(f"d{turn}")])).seq))
                for number, (token, seq) in enumerate(begun):
                    kept = number > turn - 3
                    assert await ledger.shares_history(books.uuid, token, seq) == kept
                    assert await ledger.shares_history(still.uuid, token, 1) == kept
                    assert not await ledger.shares_history(books.uuid, token, seq + 1)
        with closing(sqlite3.connect(ledger_path(tmp_path))) as connection:
            assert connection.execute("SELECT count(*) FROM epochs").fetchone() == (3,)
            assert connection.execute("SELECT count(*) FROM epoch_seqs").fetchone() <= (4,)

    async def test_receipts_are_kept_for_a_day(
        self, ledger: Ledger, books: Collection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A receipt is there for a day; later it goes with the next write that has one, or with a trim."""
        now = time.time()
        receipts = [Receipt(f"key {n}", b"asked", b"answer") for n in range(3)]
        await ledger.append(books.uuid, [], receipt=receipts[0])
        monkeypatch.setattr(rows.time, "time", lambda: now + 24 * 3600)
        await ledger.append(books.uuid, [], receipt=receipts[1])
        assert await ledger.find_receipt(books.uuid, "key 0") == receipts[0]
        monkeypatch.setattr(rows.time, "time", lambda: now + 26 * 3600)
        await ledger.append(books.uuid, [], receipt=receipts[2])
        assert await ledger.find_receipt(books.uuid, "key 0") is None
        monkeypatch.setattr(rows.time, "time", lambda: now + 50 * 3600)
        assert await ledger.trim(books.uuid, 0) == 0
        assert await ledger.find_receipt(books.uuid, "key 1") is None
        assert await ledger.find_receipt(books.uuid, "key 2") == receipts[2]

    async def test_a_clock_set_back_does_no_harm(
        self, ledger: Ledger, books: Collection, reopen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the clock a year back numbers still grow, receipts stay, and history is shared."""
        receipt = Receipt("key", b"asked", b"answer")
        await ledger.append(books.uuid, [make_document("a")], receipt=receipt)
        before = ledger.epoch
        year_ago = time.time() - 365 * 86400
        monkeypatch.setattr(rows.time, "time", lambda: year_ago)
        ledger = await reopen()
        assert await ledger.append(books.uuid, [make_document("b")], receipt=Receipt("later", b"", b"")) == Written(
            2, 1
        )
        ledger = await reopen()
        assert [op.seq for op in await log(ledger, books)] == [1, 2]
        assert await ledger.shares_history(books.uuid, before, 1)
        assert not await ledger.shares_history(books.uuid, before, 2)
        with pytest.raises(Conflict):
            await ledger.append(books.uuid, [], receipt=receipt)
        assert await ledger.find_receipt(books.uuid, "later") is not None

    async def test_a_file_of_the_first_version_is_whole(self, tmp_path: Path) -> None:
        """A ledger that version 1 of the schema holds opens with all its documents, deletions, numbers and its epoch."""
        collection, document = make_collection(model=None), make_document("kept", "text\0 ü", title="A title")
        path = ledger_path(tmp_path)
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.executescript(MIGRATIONS[0])
            connection.execute("PRAGMA user_version = 1")
            connection.execute("INSERT INTO meta VALUES ('epoch', 'the only one')")
            c = collection
            connection.executemany(
                "INSERT INTO collections VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (c.uuid, c.name, c.model, c.fingerprint, c.dim, c.shards, c.created_at, 9, 1),
                    ("dropped", None, None, "fp", 4, 1, 0.5, 1, 1),
                ],
            )
            stored = (document.content_hash, document.embedded_hash, document.vector.tobytes(), document.title)
            rest = (orjson.dumps(document.metadata), document.text)
            connection.executemany(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (c.uuid, "kept", 8, 0, *stored, *rest),
                    (c.uuid, "gone", 9, 1, *[None] * 6),
                    ("dropped", "kept", 1, 0, *stored, *rest),
                ],
            )
        for _ in range(2):
            async with self.opened(tmp_path) as ledger:
                assert await ledger.list_collections() == [collection]
                assert await ledger.state(collection.uuid) == CollectionState(9, 1)
                assert same((await ledger.documents(collection.uuid, ["kept"]))["kept"], document)
                assert [(op.seq, op.id, op.document is None) for op in await log(ledger, collection)] == [
                    (8, "kept", False),
                    (9, "gone", True),
                ]
                assert await ledger.shares_history(collection.uuid, "the only one", 9)
                assert not await ledger.shares_history(collection.uuid, "the only one", 10)
        async with self.opened(tmp_path) as ledger:
            assert await ledger.append(collection.uuid, [make_document("new")]) == Written(10, 1)
            assert await ledger.trim(collection.uuid, 10) == 1
