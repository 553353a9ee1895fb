"""A real search service on disks that are full, read-only, shared or damaged, and under a clock that was set back."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import orjson
import pytest

from tests.trouble_service import DIM, TroubledService, document, searching, until, vector_of

MANIFEST = "manifest.json"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@contextmanager
def disk_of(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own of *size*; tests are skipped where none can be mounted."""
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def clean(service: TroubledService) -> None:
    """The shards are the ledger's, to the letter."""
    audit = service.ask("POST", "/collections/c/audit")
    assert audit["clean"], audit


def found(service: TroubledService, number: int, version: int = 0) -> None:
    """A document is found by id, by its word and by its vector."""
    kept = service.ask("GET", f"/collections/c/documents/d{number}")
    assert kept["metadata"] == {"number": number, "version": version}
    for question in (
        {"query": f"word{number}x{version}", "mode": "lexical"},
        {"query_vector": vector_of(number, version), "mode": "dense"},
    ):
        body = {"collection": "c", "k": 1, "rerank": False, "cache": False, "min_seq": kept["seq"], **question}
        answer = service.ask("POST", "/search", body)
        assert [hit["id"] for hit in answer["hits"]] == [f"d{number}"], (number, question, answer)


def test_a_second_process_on_a_data_directory_is_refused(tmp_path):
    """It exits at once, not with a traceback, and names the process that has the directory; the first goes on."""
    with searching(tmp_path / "data") as service:
        second = TroubledService(tmp_path / "data", tmp_path / "second.log")
        process = second.spawn()
        assert process.wait(60) != 0
        written = second.written()
        assert f"in use by process {service.pid}" in written
        assert str(tmp_path / "data") in written
        assert "Traceback" not in written
        assert service.call("GET", "/readyz")[0] == 200


def test_a_read_only_data_directory_is_said_at_the_start(tmp_path):
    """It exits and says which path cannot be written, without a traceback; made writable again, it has everything."""
    with disk_of(tmp_path / "disk", "64m") as disk:
        with searching(disk / "data") as service:
            service.ask("POST", "/collections", {"name": "c", "dim": DIM})
            service.write(range(5))
            service.stop()
        mount("-o", "remount,ro", str(disk))
        failing = TroubledService(disk / "data", tmp_path / "ro.log")
        process = failing.spawn()
        assert process.wait(60) != 0
        written = failing.written()
        assert str(disk / "data") in written
        assert "read-only" in written.lower() or "writ" in written.lower()
        assert "Traceback" not in written
        mount("-o", "remount,rw", str(disk))
        with searching(disk / "data") as service:
            found(service, 3)
            clean(service)


def test_a_full_disk_refuses_writes_and_answers_searches(tmp_path):
    """A write that does not fit is a 503 that says so; searches go on; with room again, writes do, and nothing is lost."""
    environ = {"SEARCH_SNAPSHOT_INTERVAL_S": "0.5", "SEARCH_SNAPSHOT_OPERATIONS": "50"}
    with disk_of(tmp_path / "disk", "48m") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(30 << 20))
        with searching(disk / "data", **environ) as service:
            service.log = tmp_path / "service.log"
            service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
            written = []
            for number in range(400):
                text = f"word{number}x0 " + f"filler{number} " * 8000
                body = {"documents": [document(number, text=text)]}
                status, answer = service.call("POST", "/collections/c/documents?wait=acknowledged", body)
                if status != 200:
                    break
                written.append(number)
            assert status in (503, 507), (status, answer)
            assert "full" in answer["error"]["message"], answer
            assert answer["error"]["retryable"] is True
            assert 2 <= len(written) < 400
            before = written[0]
            for _ in range(5):
                answer = service.search(before)
                assert [hit["id"] for hit in answer["hits"]] == [f"d{before}"], answer
            assert service.call("GET", "/readyz")[0] == 200
            time.sleep(2)  # Snapshots and maintenance fail meanwhile.
            assert service.search(before)["hits"][0]["id"] == f"d{before}"
            filler.unlink()
            until(lambda: service.call("POST", "/collections/c/documents", {"documents": [document(1000)]})[0] == 200)
            for number in (*written, 1000):
                found(service, number)
            clean(service)
            service.stop()
            with searching(disk / "data") as again:
                for number in (*written, 1000):
                    found(again, number)
                clean(again)


def test_a_clock_that_was_set_back_changes_nothing(tmp_path):
    """Set back while it runs and at its start: order goes by seq, new snapshots are newest, idle collections close."""
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None:
        pytest.skip("there is no libfaketime")
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    environ = {"SEARCH_SNAPSHOT_INTERVAL_S": "0.3", "SEARCH_IDLE_CLOSE_S": "4", "LD_PRELOAD": str(library)}
    environ |= {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with searching(tmp_path / "data", **environ) as service:
        service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 1})
        service.write(range(200))
        first = service.ask("POST", "/collections/c/snapshot")["hosts"]["local"]["0"]
        last = service.write(range(50), 1)["seq"]
        for setting in ("-1d", "-365d"):
            clock.write_text(setting)
            version = 2 * len(setting)
            assert service.write(range(5), version)["seq"] == last + 5
            last += 5
            found(service, 3, version)
            found(service, 10, 1)
            question = {"collection": "c", "query": f"word3x{version}", "mode": "lexical", "rerank": False}
            assert not service.ask("POST", "/search", question)["cache"]["hit"]
            hit = service.ask("POST", "/search", question)["cache"]
            assert hit["hit"]
            assert hit["age_ms"] >= 0
            written = service.write([3], version + 1)
            assert written["applied"], written
            last = written["seq"]
            assert not service.ask("POST", "/search", question)["cache"]["hit"]
            newer = service.ask("POST", "/collections/c/snapshot")["hosts"]["local"]["0"]
            assert newer == last > first
            (current,) = (service.data_dir / "shards").glob("*/0/CURRENT")
            manifest = orjson.loads(
                (current.parent / "snapshots" / current.read_text().strip() / MANIFEST).read_bytes()
            )
            assert manifest["seq"] == last
            until(lambda: not store_is_open(service), within_s=20)
            found(service, 3, version + 1)
            service.stop()
            service.start()
            found(service, 3, version + 1)
            found(service, 10, 1)
            clean(service)


def store_is_open(service: TroubledService) -> bool:
    """Whether any collection's shard is open."""
    handles = Path(f"/proc/{service.pid}/fd").iterdir()
    for handle in handles:
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(handle).endswith("store.sqlite"):
                return True
    return False


def damage(path: Path) -> None:
    """Flip bytes in the middle and near the end of a file."""
    data = bytearray(path.read_bytes())
    for place in {len(data) // 2, max(0, len(data) - 3)}:
        if place < len(data):
            data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The data of a service that was stopped: two shards with two snapshots each, sealed segments and words on disk."""
    directory = tmp_path_factory.mktemp("stopped") / "data"
    with searching(directory) as service:
        service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
        service.write(range(600))
        service.ask("POST", "/collections/c/documents/delete", {"ids": [f"d{n}" for n in range(100, 150)]})
        service.ask("POST", "/collections/c/snapshot")
        service.write(range(40), 1)
        service.stop()
    return directory


def shard_files(directory: Path) -> dict[str, list[Path]]:
    """Return the files below one data directory's shards by their kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted((directory / "shards").rglob("*")):
        if path.is_file() and path.name != ".lock" and path.stat().st_size:
            kind = path.parent.name if path.parent.name in ("vectors", "lexical") else path.name
            if path.parent.parent.parent.name == "snapshots" or path.parent.parent.name == "snapshots":
                kind = f"snapshot {kind}"
            kinds.setdefault(kind, []).append(path)
    return kinds


KINDS = ("CURRENT", "store.sqlite", "vectors", "lexical", "manifest.json", "ids.bin", "live.bin", "attributes.bin")


@pytest.mark.parametrize("kind", [*KINDS, "no store.sqlite", "no vectors", "everything"])
def test_damaged_files_of_a_shard_are_mended_at_the_start(stopped, tmp_path, kind):
    """Whatever file is flipped or gone, the service starts, says so while it catches up, and is the ledger's again."""
    data = tmp_path / "data"
    shutil.copytree(stopped, data)
    kinds = shard_files(data)
    if kind == "everything":
        chosen = [path for paths in kinds.values() for path in paths]
    else:
        wanted = kind.removeprefix("no ")
        chosen = [path for name, paths in kinds.items() if wanted in name for path in paths]
    assert chosen, kinds.keys()
    for path in chosen:
        if kind.startswith("no "):
            path.unlink()
        else:
            damage(path)
    with searching(data) as service:
        seq = service.ask("GET", "/collections/c")["seq"]
        answer = service.search(10, 1)
        complete = answer["as_of"] >= seq
        assert complete or "catching_up" in answer["degraded"], answer
        answer = service.search(10, 1, min_seq=seq, timeout_ms=30_000)
        assert answer["hits"][0]["id"] == "d10"
        for number in (20, 39):
            found(service, number, 1)
        for number in (40, 99, 150, 599):
            found(service, number)
        assert service.call("GET", "/collections/c/documents/d120")[0] == 404
        until(lambda: "catching_up" not in service.search(10, 1)["degraded"])
        clean(service)
        service.write(range(20), 2)
        service.ask("POST", "/collections/c/snapshot")
        service.stop()
        service.start()
        found(service, 10, 2)
        clean(service)


def test_repair_mends_a_store_that_was_changed_by_hand(tmp_path):
    """A row deleted from a running shard's store is found by an audit, and there again after one that repairs."""
    with searching(tmp_path / "data") as service:
        service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 1})
        service.write(range(100))
        (store,) = (tmp_path / "data" / "shards").glob("*/0/store.sqlite")
        connection = apsw.Connection(str(store))
        connection.set_busy_timeout(5000)
        connection.execute("DELETE FROM documents WHERE id = 'd7'")
        connection.close()
        question = {"collection": "c", "query": "word7x0", "rerank": False, "mode": "lexical"}
        status, answer = service.call("POST", "/search", question)
        assert (status, answer["hits"], answer["degraded"]) == (200, [], ["shards_partial"])
        audit = service.ask("POST", "/collections/c/audit")
        assert not audit["clean"]
        (shard,) = audit["hosts"]["local"]
        assert "d7" in [id_ for ids in shard["differences"].values() for id_ in ids], audit
        repaired = service.ask("POST", "/collections/c/audit?repair=true")
        assert repaired["hosts"]["local"][0]["repaired"] >= 1
        clean(service)
        found(service, 7)


def test_another_number_of_shards_is_refused_with_the_way_out(tmp_path):
    """Where the ledger's record says another number than the snapshots, nothing is rebuilt: the error tells of reindexing."""
    with searching(tmp_path / "data") as service:
        service.ask("POST", "/collections", {"name": "c", "dim": DIM, "shards": 2})
        service.write(range(50))
        service.ask("POST", "/collections/c/snapshot")
        status, answer = service.call("POST", "/collections", {"name": "c", "dim": DIM, "shards": 3})
        assert status == 409
        assert "reindex" in answer["error"]["message"]
        service.stop()
        connection = apsw.Connection(str(tmp_path / "data" / "ledger.db"))
        connection.execute("UPDATE collections SET shards = 3")
        connection.close()
        service.start()
        question = {"collection": "c", "query": "word3x0", "mode": "lexical", "rerank": False}
        status, answer = service.call("POST", "/search", question)
        told = orjson.dumps(answer).decode()
        assert status == 503 or answer["degraded"], told
        assert "reindex" in told, told
        service.stop()
        connection = apsw.Connection(str(tmp_path / "data" / "ledger.db"))
        connection.execute("UPDATE collections SET shards = 2")
        connection.close()
        service.start()
        found(service, 3)
        clean(service)


def test_a_service_without_room_for_its_port_still_says_why(tmp_path):
    """A port that is taken ends the second process with a message, and its claim on its own directory with it."""
    with searching(tmp_path / "one") as service:
        other = TroubledService(tmp_path / "two", tmp_path / "two.log", SEARCH_LISTEN_PORT=str(service.port))
        assert other.spawn().wait(60) != 0
        assert "in use" in other.written().lower()
    with searching(tmp_path / "two") as service:
        assert service.call("GET", "/readyz")[0] == 200
