"""What the embedded ledger promises holds when the power fails, the disk is full, or it fails now and then."""

import asyncio
import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import pytest

from services.common.errors import Unavailable
from services.search.ledger import sqlite, writer
from services.search.ledger.sqlite import SqliteLedger
from services.search.ports import NO_DOCUMENT, Collection, Receipt, Written
from tests.chaos.power_cut import Disk
from tests.contract.ledger_model import Model, make_collection, make_document

RUNS = int(os.environ.get("TERCET_CHAOS_RUNS", "10"))
STEPS = 30


@pytest.fixture(autouse=True)
def _frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHECKPOINT_BYTES", 300_000)


@pytest.fixture
def seed() -> int:
    return 0


@pytest.fixture
def disk(seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(seed)
    monkeypatch.setattr(sqlite, "sync_directory", disk.note_directory_sync)
    yield disk
    disk.remove()


@dataclass
class Story:
    """
    A seeded sequence of writes to one ledger; *model* is what was acknowledged.

    Each of *hoped* is that and one write that failed since: what was written of it, but not synced, may be found whole
    when the file is opened again.
    """

    path: Path
    disk: Disk
    chance: random.Random
    collection: Collection = field(default_factory=make_collection)
    model: Model = field(default_factory=Model)
    hoped: list[Model] = field(default_factory=list)
    created: bool = False
    epochs: list[tuple[str, int]] = field(default_factory=list)
    ledger: SqliteLedger | None = None

    async def run(self, steps: int) -> None:
        """Open the ledger if it is closed, and make *steps* writes; Unavailable ends it."""
        if self.ledger is None:
            await self.open(self.disk.name)
        assert self.ledger is not None
        if not self.created:
            await self.ledger.create_collection(self.collection)
            self.created = True
        for _ in range(steps):
            await self.step()

    async def step(self) -> None:
        """Append, delete, or close and reopen."""
        assert self.ledger is not None
        self.epochs.append((self.ledger.epoch, self.model.seq))
        kind = self.chance.random()
        uuid = self.collection.uuid
        ids = [f"d{n}" for n in self.chance.sample(range(40), self.chance.randrange(1, 8))]
        expected = {ids[0]: self.chance.choice([NO_DOCUMENT, self.model.stands_at(ids[0])])}
        if kind < 0.7:
            size = self.chance.choice([5, 300, 30_000])
            trying = self.model.copy()
            self.hoped.append(trying)
            batch = [make_document(id_, f"{self.model.seq} {id_} ".ljust(size, "x")) for id_ in ids]
            receipt = Receipt(f"key {self.chance.random()}", b"digest", b"body")
            hoped = trying.append(batch, expected, receipt)
            assert await self.ledger.append(uuid, batch, expected=expected, receipt=receipt) == hoped
        elif kind < 0.93:
            trying = self.model.copy()
            self.hoped.append(trying)
            hoped = trying.delete(ids, expected)
            assert await self.ledger.delete(uuid, ids, expected=expected) == hoped
        else:
            await self.close()
            await self.open(self.disk.name)
            return
        self.model, self.hoped = trying, []

    async def open(self, vfs: str | None = None) -> None:
        """Open the file: all that was acknowledged is whole, and of the writes that failed since one, whole, or none."""
        self.ledger = await SqliteLedger.open(self.path, vfs=vfs)
        if await self.ledger.find_collection(self.collection.name) is None:
            assert not self.created
            return
        self.created = True
        seq = (await self.ledger.state(self.collection.uuid)).seq
        for model in (self.model, *self.hoped):
            if model.seq == seq:
                with contextlib.suppress(AssertionError):
                    await model.check(self.ledger, self.collection)
                    self.model, self.hoped = model, []
                    return
        raise AssertionError(f"the ledger stands at {seq} and holds neither {self.model} nor any of {self.hoped}")

    async def close(self) -> None:
        """Close the ledger if it is open."""
        if self.ledger is not None:
            closing, self.ledger = self.ledger, None
            await closing.aclose()

    async def check(self) -> None:
        """Open what is left without the shim, find it as it should be, and write on."""
        await self.open()
        ledger = self.ledger
        assert ledger is not None
        try:
            if not self.created:
                await ledger.create_collection(self.collection)
            for epoch, seq in self.epochs:
                assert await ledger.shares_history(self.collection.uuid, epoch, seq)
            trying = self.model.copy()
            self.hoped.append(trying)
            batch = [make_document("after")]
            assert await ledger.append(self.collection.uuid, batch) == self.model.append(batch)
            await self.model.check(ledger, self.collection)
        finally:
            await self.close()
        connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        assert connection.pragma("integrity_check") == "ok"
        connection.close()


async def operations_of(seed: int, disk: Disk, place: Path) -> int:
    """Return how many operations of the disk the story of *seed* takes when nothing happens to it."""
    story = Story(place / "rehearsal.db", disk, random.Random(seed))
    await story.run(STEPS)
    await story.close()
    taken, disk.operations = disk.operations, 0
    return taken


@pytest.mark.parametrize("seed", range(RUNS))
async def test_a_power_cut_loses_nothing_acknowledged(seed: int, disk: Disk, tmp_path: Path) -> None:
    """Wherever the power fails, each acknowledged write is there whole, and the one under way whole or absent."""
    story = Story(tmp_path / "ledger.db", disk, random.Random(seed))
    disk.cut_at = random.Random(seed).randrange(1, await operations_of(seed, disk, tmp_path))
    with contextlib.suppress(Unavailable):  # It may also fail while the ledger is closed, which raises nothing.
        await story.run(STEPS)
    await story.close()
    assert disk.operations >= disk.cut_at
    disk.settle()
    await story.check()


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("error", [apsw.FullError, apsw.IOError])
async def test_a_failing_disk_costs_only_the_write_it_fails(
    seed: int, error: type[apsw.Error], disk: Disk, tmp_path: Path
) -> None:
    """Writes that meet a full or failing disk raise Unavailable and leave nothing; when it works again they go on."""
    story = Story(tmp_path / "ledger.db", disk, random.Random(seed))
    chance = random.Random(seed)
    total = await operations_of(seed, disk, tmp_path)
    kinds = chance.choice([("write",), ("sync",), ("write", "sync", "truncate", "delete")])
    first = chance.randrange(1, total)
    last = first + chance.choice([1, 3, 20])

    def fault(kind: str) -> Exception | None:
        return error("as told") if kind in kinds and first <= disk.operations < last else None

    disk.fault = fault
    refused = 0
    for _ in range(STEPS * 2):
        try:
            await story.run(1)
        except Unavailable:
            refused += 1
            assert refused <= last - first
    await story.close()
    await story.check()


async def test_a_full_disk_refuses_writes_and_answers_reads(disk: Disk, tmp_path: Path) -> None:
    """As long as the disk is full every write says so, every read goes on, and afterwards writes do too."""
    story = Story(tmp_path / "ledger.db", disk, random.Random(1))
    await story.run(5)
    ledger, uuid = story.ledger, story.collection.uuid
    assert ledger is not None
    disk.fault = lambda kind: apsw.FullError("no space") if kind == "write" else None
    for _ in range(3):
        with pytest.raises(Unavailable, match="full"):
            await ledger.append(uuid, [make_document("new")])
        await story.model.check(ledger, story.collection)
        assert ledger.heard_seq(uuid) == story.model.seq
    disk.fault = None
    await story.run(5)
    await story.close()
    await story.check()


async def test_a_read_only_disk_is_unavailable(disk: Disk, tmp_path: Path) -> None:
    """A ledger that cannot be written is not opened, with an error that says what to do; one that is open is read."""
    story = Story(tmp_path / "ledger.db", disk, random.Random(2))
    await story.run(5)
    ledger = story.ledger
    assert ledger is not None
    disk.fault = lambda _kind: apsw.ReadOnlyError("mounted read-only")
    with pytest.raises(Unavailable, match="let this user write"):
        await ledger.delete(story.collection.uuid, list(story.model.live))
    await story.model.check(ledger, story.collection)
    await story.close()
    with pytest.raises(Unavailable, match="let this user write"):
        await SqliteLedger.open(story.path, vfs=disk.name)
    disk.fault = None
    await story.check()


async def test_power_fails_amid_many_writers(disk: Disk, tmp_path: Path) -> None:
    """Of appends that share transactions, those that were acknowledged are whole after a power cut."""
    ledger = await SqliteLedger.open(tmp_path / "ledger.db", vfs=disk.name)
    books = make_collection()
    await ledger.create_collection(books)
    disk.cut_at = disk.operations + 150
    batches = [[make_document(f"{turn}-{n}", f"text {turn}") for n in range(3)] for turn in range(400)]
    outcomes = await asyncio.gather(*(ledger.append(books.uuid, batch) for batch in batches), return_exceptions=True)
    await ledger.aclose()
    disk.settle()
    assert any(isinstance(outcome, Unavailable) for outcome in outcomes)
    ledger = await SqliteLedger.open(tmp_path / "ledger.db")
    for batch, outcome in zip(batches, outcomes, strict=True):
        found = await ledger.documents(books.uuid, [document.id for document in batch])
        assert len(found) == 3 if isinstance(outcome, Written) else len(found) in (0, 3)
    await ledger.aclose()
