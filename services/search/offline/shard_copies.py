"""
Copies of shards' snapshots, taken beside the service that makes and removes them.

A snapshot's own files never change: they get second names, so that nothing is lost when the service removes the
first. The store of the rows' texts does change. The rows that the snapshot knows are copied from it in short reads,
which never keep the service from shortening the store's log. Rows that were replaced since are missing in the copy;
the ledger, copied later, has the operations that replaced them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from services.search.claim import LOCK_FILE
from services.search.offline.layout import ShardMark
from services.search.shards import files
from services.search.shards.files import Damaged
from services.search.shards.opening import VECTORS
from services.search.shards.snapshot import LEXICAL, FileMark, Manifest, Snapshots
from services.search.shards.store import FILE

_ATTEMPTS = 5
_PAGE = 200
_BUSY_TIMEOUT_MS = 30_000


def shard_directories(directory: Path) -> Iterator[Path]:
    """Yield the directories of all shards below *directory*, which need not be there."""
    found = directory.glob("*/*")
    yield from sorted(path for path in found if path.is_dir() and path.name.isdecimal())


def stage_shard(source: Path, target: Path) -> ShardMark | None:
    """
    Put the newest good snapshot of the shard in *source*, with its store, into the new directory *target*.

    None: there is no snapshot, or none that is good; *target* is not there then. *target* is on the same file system:
    large files are not copied but get a second name. Raises OSError.
    """
    for _ in range(_ATTEMPTS):
        held_since = _held_since(source)
        snapshots = Snapshots(source)
        names = snapshots.names()
        for name in names:
            try:
                manifest = snapshots.manifest(name)
                _stage(source, target, name, manifest)
            except (Damaged, FileNotFoundError, apsw.Error):
                files.remove(target)
                continue
            if _held_since(source) == held_since:
                return ShardMark(
                    collection=manifest.collection, shard=manifest.shard, documents=manifest.documents, seq=manifest.seq
                )
            files.remove(target)  # It was opened anew meanwhile: rows may have changed their numbers.
            break
        if names == snapshots.names() and _held_since(source) == held_since:
            return None
    return None


def _held_since(source: Path) -> int:
    """Return when the shard was last opened: whoever opens it writes its number into this file."""
    try:
        return (source / LOCK_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _stage(source: Path, target: Path, name: str, manifest: Manifest) -> None:
    """Raise Damaged or FileNotFoundError where the snapshot is not good, or not there any more."""
    taken = Snapshots(source).lexical_directory(name).parent
    given = Snapshots(target).lexical_directory(name).parent
    (given / LEXICAL).mkdir(parents=True)
    (target / VECTORS).mkdir()
    for path in sorted(path for path in taken.rglob("*") if path.is_file()):
        files.hard_link(path, given / path.relative_to(taken))
    for file in manifest.vector_files:
        files.hard_link(source / VECTORS / file, target / VECTORS / file)
    _check(given, manifest.files)
    _check(given / LEXICAL, manifest.lexical["files"])
    _check(target / VECTORS, manifest.vectors["files"])
    _copy_store(source / FILE, target / FILE, manifest)


def _check(directory: Path, marks: Any) -> None:
    for name, mark in marks.items():
        known = FileMark.model_validate(mark)
        files.check_file(directory / name, known.bytes, known.sha256)


def _copy_store(source: Path, target: Path, manifest: Manifest) -> None:
    """Copy the rows that the snapshot knows. Raises Damaged where it is not the store that the snapshot was made of."""
    if not source.exists():
        raise Damaged(f"{FILE} is missing")
    read = apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READONLY)
    write = apsw.Connection(str(target))
    try:
        read.set_busy_timeout(_BUSY_TIMEOUT_MS)
        write.pragma("journal_mode", "off")
        write.pragma("synchronous", "off")  # It is a copy: what a crash leaves of it is thrown away.
        _copy_rows(read, write, manifest)
        found = [str(line) for (line,) in write.execute("PRAGMA quick_check")]
    finally:
        write.close()
        read.close()
    if found != ["ok"]:
        raise Damaged(f"{FILE}: {'; '.join(found[:3])}")


def _copy_rows(read: apsw.Connection, write: apsw.Connection, manifest: Manifest) -> None:
    meta = {str(key): str(value) for key, value in read.execute("SELECT key, value FROM meta")}
    if meta.get("token") != manifest.store_token or int(meta.get("seq", -1)) < manifest.store_seq:
        raise Damaged(f"{FILE} is not the store that the snapshot was made of")
    schema = [
        (str(kind), str(sql))
        for kind, sql in read.execute("SELECT type, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")
    ]
    for sql in (sql for kind, sql in schema if kind == "table"):
        write.execute(sql)
    meta["seq"] = str(manifest.store_seq)
    write.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    columns = int(read.execute("SELECT count(*) FROM pragma_table_info('documents')").get)
    insert = f"INSERT INTO documents VALUES ({', '.join('?' * columns)})"
    last = -1
    write.execute("BEGIN")
    while True:
        page = read.execute(
            "SELECT * FROM documents WHERE row > ? AND row < ? ORDER BY row LIMIT ?", (last, manifest.next_row, _PAGE)
        )
        write.executemany(insert, page)
        newest: Any = write.execute("SELECT max(row) FROM documents").get
        if newest is None or newest == last:
            break
        last = newest
    write.execute("COMMIT")
    for sql in (sql for kind, sql in schema if kind != "table"):
        write.execute(sql)
