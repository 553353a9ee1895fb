"""Backups of a search service that is being written to, and what is restored of them."""

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest

from services.search.offline.backup import STAGING, back_up
from services.search.offline.errors import BackupError, OfflineError
from services.search.offline.layout import LEDGER
from services.search.offline.restoring import restore
from tests.search_process import SearchProcess

pytestmark = pytest.mark.slow

FIRST = 300


def vector(number: int) -> list[float]:
    """Return a vector that is nearest to itself among those of all other numbers."""
    return [1.0, number / 100, (number * 7 % 13) / 10, (number * 5 % 11) / 10]


def document(number: int) -> dict[str, Any]:
    """Return a document with a word of its own."""
    return {"id": f"d{number}", "text": f"wort{number}x among others", "vector": vector(number)}


def write(service: SearchProcess, numbers: range) -> int:
    """Write documents, searchable at the end; return the last operation."""
    body = {"documents": [document(number) for number in numbers]}
    return service.ask("POST", "/collections/c/documents", body)["seq"]


def start(directory: Path) -> SearchProcess:
    """Start a service on *directory* that seals and snapshots after a few documents."""
    service = SearchProcess(directory, SEARCH_TAIL_ROWS="64", SEARCH_HNSW_ROWS="128", SEARCH_SNAPSHOT_OPERATIONS="100")
    service.start()
    return service


def caught_up(service: SearchProcess, search: dict[str, Any]) -> Any:
    """Return the answer to *search*, asked again for as long as it says that shards are catching up."""
    for _ in range(300):
        reply = service.ask("POST", "/search", search)
        if "catching_up" not in reply["degraded"]:
            break
        time.sleep(0.1)
    return reply


def check(service: SearchProcess, numbers: range) -> None:
    """Assert that the documents are found by id, by words and by vector, and that an audit finds no difference."""
    for number in numbers:
        assert service.ask("GET", f"/collections/c/documents/d{number}")["text"] == document(number)["text"]
        for question in (
            {"query": f"wort{number}x", "mode": "lexical"},
            {"query_vector": vector(number), "mode": "dense"},
        ):
            reply = caught_up(service, {"collection": "c", "rerank": False, "k": 3, "cache": False, **question})
            assert f"d{number}" in [hit["id"] for hit in reply["hits"]], (number, question, reply)
    for shards in service.ask("POST", "/collections/c/audit")["hosts"].values():
        assert not any(ids for shard in shards for ids in shard["differences"].values())


@pytest.fixture(scope="module")
def backups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with one backup, of FIRST documents at least, made by the command while a service was written to."""
    directory = tmp_path_factory.mktemp("search")
    service = start(directory / "data")
    try:
        service.ask("POST", "/collections", {"name": "c", "dim": 4, "shards": 2})
        write(service, range(FIRST))
        service.ask("POST", "/collections/c/snapshot")
        stop = threading.Event()
        writer = threading.Thread(target=write_until, args=(stop, service))
        writer.start()
        try:
            done = tercet("snapshot", "--to", directory / "backups", "--data-dir", directory / "data")
        finally:
            stop.set()
            writer.join()
        assert done.returncode == 0, done.stderr
        assert "backed up: " in done.stdout
        assert not (directory / "data" / STAGING).exists()
    finally:
        service.stop()
    return directory / "backups"


def write_until(stop: threading.Event, service: SearchProcess) -> None:
    """Replace and add documents, one batch after the other."""
    first = FIRST
    while not stop.is_set():
        write(service, range(first, first + 20))
        write(service, range(0, 20))
        first += 20


def tercet(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tercet.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def name_of(backups: Path) -> str:
    return sorted(path.name for path in backups.iterdir())[-1]


def test_all_that_was_acknowledged_is_restored(backups: Path, tmp_path: Path) -> None:
    """A service on restored data has every document by id, words and vector, from snapshots and not by indexing."""
    done = tercet("restore", backups, "--data-dir", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    snapshots = {path.name for path in tmp_path.glob("data/shards/*/*/snapshots/*")}
    assert snapshots
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    service = start(tmp_path / "data")
    try:
        check(service, range(0, FIRST, 7))
        write(service, range(1000, 1010))
        check(service, range(1000, 1010))
    finally:
        service.stop()
    log = service.log.read_text()
    assert "snapshot_damaged" not in log
    assert "Traceback" not in log


def test_without_shards_they_are_indexed_again(backups: Path, tmp_path: Path) -> None:
    """A backup of the ledger alone is enough."""
    restore(str(backups), tmp_path / "data")
    back_up(tmp_path / "data", str(tmp_path / "small"), shards=False)
    restored = restore(str(tmp_path / "small"), tmp_path / "again")
    assert list(restored.manifest.files) == [LEDGER]
    service = start(tmp_path / "again")
    try:
        check(service, range(0, FIRST, 29))
    finally:
        service.stop()


def test_an_earlier_ledger_under_newer_shards(backups: Path, tmp_path: Path) -> None:
    """Shards that are ahead of a restored ledger are made again: what it lacks is gone, and new writes are found."""
    data = tmp_path / "data"
    restore(str(backups), data)
    service = start(data)
    service.ask("POST", "/collections/c/documents/delete", {"ids": ["d7"]})
    write(service, range(5000, 5200))
    service.ask("POST", "/collections/c/snapshot")
    service.stop()
    restore(str(backups), tmp_path / "earlier")
    for path in data.glob(f"{LEDGER}*"):
        path.unlink()
    shutil.copy(tmp_path / "earlier" / LEDGER, data / LEDGER)
    service = start(data)
    try:
        write(service, range(6000, 6010))
        check(service, range(0, FIRST, 29))
        check(service, range(6000, 6010))
        check(service, range(7, 8))
        assert service.call("GET", "/collections/c/documents/d5000")[0] == 404
        reply = service.ask("POST", "/search", {"collection": "c", "query": "wort5000x", "mode": "lexical"})
        assert "d5000" not in [hit["id"] for hit in reply["hits"]]
    finally:
        service.stop()


@pytest.mark.parametrize("pattern", [LEDGER, "shards/*/*/store.sqlite", "shards/*/*/vectors/*"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_backup_is_refused(backups: Path, tmp_path: Path, pattern: str, how: str) -> None:
    """The file is named, and nothing is left where the data would have been."""
    shutil.copytree(backups, tmp_path / "backups")
    path = sorted((tmp_path / "backups" / name_of(backups)).glob(pattern))[0]
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if how == "flipped" else data[:-1])
    with pytest.raises(BackupError, match=f"damaged.*{path.name}"):
        restore(str(tmp_path / "backups"), tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backups"]


def test_a_backup_without_a_manifest_is_passed_over(backups: Path, tmp_path: Path) -> None:
    """One that was interrupted is no backup; asked for by name it is refused."""
    shutil.copytree(backups, tmp_path / "backups")
    half = tmp_path / "backups" / "29991231T000000.000Z"
    shutil.copytree(tmp_path / "backups" / name_of(backups), half)
    (half / "manifest.json").write_text("{")
    assert restore(str(tmp_path / "backups"), tmp_path / "data").passed_over == [half.name]
    with pytest.raises(BackupError, match="never finished"):
        restore(str(half), tmp_path / "other")
    with pytest.raises(BackupError, match="no whole backup"):
        restore(str(tmp_path / "nothing"), tmp_path / "other")


def test_nothing_is_overwritten(backups: Path, tmp_path: Path) -> None:
    """A directory that is not empty is refused, and stays as it is; an empty one and a named backup are fine."""
    (tmp_path / "data").mkdir()
    restore(f"{backups}/{name_of(backups)}", tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(BackupError, match="not empty"):
        restore(str(backups), tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_mount_point_is_filled_from_within(backups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed to: files are checked in a folder of it and then moved; what was left there is no matter."""
    left = tmp_path / "data" / ".restoring"
    left.mkdir(parents=True)
    (left / "old").write_text("half")
    (tmp_path / "data" / "lost+found").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path / "data"))
    restore(str(backups), tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [LEDGER, "lost+found", "shards"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_killed_restore_left_is_no_data(backups: Path, tmp_path: Path) -> None:
    """It lies beside the directory, and the next restore begins anew."""
    left = tmp_path / ".restoring-data" / "shards"
    left.mkdir(parents=True)
    (left / "old").write_text("half")
    restore(str(backups), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not (tmp_path / "data" / "shards" / "old").exists()


def test_the_newest_are_kept(backups: Path, tmp_path: Path) -> None:
    """`keep` removes older backups and the half-made ones among them; in memory as on disk."""
    restore(str(backups), tmp_path / "data")
    for place in (str(tmp_path / "kept"), "memory://kept"):
        made = [back_up(tmp_path / "data", place, shards=False) for _ in range(3)]
        last = back_up(tmp_path / "data", place, keep=2)
        assert [url.rpartition("/")[2] for url in last.removed] == [m.url.rpartition("/")[2] for m in made[1::-1]]
        fs, root = fsspec.core.url_to_fs(place)
        names = sorted(path.rpartition("/")[2] for path in fs.ls(root, detail=False))
        assert names == [made[2].url.rpartition("/")[2], last.url.rpartition("/")[2]]
    assert restore("memory://kept", tmp_path / "again").url == last.url
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [LEDGER, "shards"]


def test_a_damaged_snapshot_is_left_out(backups: Path, tmp_path: Path) -> None:
    """A shard whose snapshot is not as it was written is named; the ledger has its documents all the same."""
    restore(str(backups), tmp_path / "data")
    path = sorted(tmp_path.glob("data/shards/*/0/snapshots/*/ids.bin"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    made = back_up(tmp_path / "data", str(tmp_path / "backups"))
    assert [name.rpartition("/")[2] for name in made.left_out] == ["0"]
    assert [shard.shard for shard in made.manifest.shards] == [1]


def test_what_cannot_be_backed_up_is_said(backups: Path, tmp_path: Path) -> None:
    """No data, a stack's folder, no ledger, a broken ledger, an unknown and an uninstalled protocol: each has its line."""
    (tmp_path / "stack" / "search").mkdir(parents=True)
    restore(str(backups), tmp_path / "data")
    shutil.move(tmp_path / "data", tmp_path / "node")
    shutil.copytree(tmp_path / "node", tmp_path / "broken")
    shutil.copy(tmp_path / "node" / LEDGER, tmp_path / "stack" / "search" / LEDGER)
    whole = tmp_path / "stack" / "search"
    (tmp_path / "node" / LEDGER).unlink()
    (tmp_path / "broken" / LEDGER).write_bytes(b"no ledger" * 1000)
    cases = [
        (tmp_path / "nowhere", "memory://x", "no data directory"),
        (tmp_path / "stack", "memory://x", "folder of a whole stack"),
        (tmp_path / "node", "memory://x", "--no-ledger"),
        (tmp_path / "broken", "memory://x", "damaged or is not a ledger"),
        (whole, "nope://x", "no protocol nope:// is known"),
        (whole, "/dev/null/x", "could not be"),
    ]
    if find_spec("s3fs") is None:
        cases.append((whole, "s3://bucket/x", "s3fs"))
    for data_dir, to, message in cases:
        with pytest.raises(OfflineError, match=message):
            back_up(data_dir, to)
    assert back_up(tmp_path / "node", "memory://node", ledger=False).manifest.collections is None


def test_the_copy_is_compact_and_whole(backups: Path, tmp_path: Path) -> None:
    """The copied ledger has no free pages and passes SQLite's check; the manifest counts what is in it."""
    restore(str(backups), tmp_path / "data")
    with sqlite3.connect(tmp_path / "data" / LEDGER) as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert ledger.execute("PRAGMA freelist_count").fetchall() == [(0,)]
        counted = ledger.execute("SELECT count(*) FROM documents WHERE NOT deleted").fetchone()[0]
    manifest = json.loads((backups / name_of(backups) / "manifest.json").read_text())
    assert [collection["documents"] for collection in manifest["collections"]] == [counted]
    assert counted >= FIRST
