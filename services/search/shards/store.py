"""
The stored fields of a shard's live rows: SQLite in the shard's directory, one row for each id.

A power cut may cost the last commits, and never leaves it corrupt; what was committed before `checkpoint` is safe. It
has a token of its own and the number of the last operation it stored, by which a snapshot tells that it is the store
that it was made of, and no older one.
"""

import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import orjson
from pyroaring import BitMap

from services.search.ports import LedgerDocument, Match, ShardDocument
from services.search.shards.files import Damaged

FILE = "store.sqlite"

_BUSY_TIMEOUT_MS = 30_000
_WRITER_CACHE_KIB = 16 * 1024
_LOG_PAGES = 16 * 1024  # 64 MiB: with less, random ids make the same pages be written over and over.
_PAGE = 500
_SCAN_PAGE = 20_000

_SCHEMA = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE documents (
        row INTEGER PRIMARY KEY, id TEXT NOT NULL, seq INTEGER NOT NULL, title TEXT, text TEXT NOT NULL,
        metadata BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX documents_by_id ON documents (id);
"""
_INSERT = "INSERT INTO documents (row, id, seq, title, text, metadata) VALUES (?, ?, ?, ?, ?, ?)"
_LISTED = "(SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class StoreMark:
    """What a snapshot keeps of the store: whose it is, and the last operation that was stored."""

    token: str
    seq: int


class ShardStore:
    """Id, operation number, title, text and metadata by row. One writer and many readers may use it at once."""

    def __init__(self, directory: Path, *, expected: StoreMark | None = None) -> None:
        """
        Open the store in *directory*: a new one in the place of what is there, or the one that *expected* tells of.

        Raises:
            Damaged: There is none, or it cannot be read, or it is another or older than *expected*.
        """
        self._path = directory / FILE
        self._reading = threading.Lock()
        self._log_pages = 0
        if expected is None:
            remove_store(directory)
        elif not self._path.exists():
            raise Damaged(f"{FILE} is missing")
        connections: list[apsw.Connection] = []
        try:
            connections.append(_connect(self._path))
            connections.append(_connect(self._path))
            self._writer, self._reader = connections
            self._writer.pragma("cache_size", -_WRITER_CACHE_KIB)
            self._writer.set_wal_hook(self._note_log)
            if expected is None:
                self.mark = StoreMark(uuid.uuid4().hex, 0)
                self._create()
            else:
                self.mark = self._read_mark()
        except Exception as error:
            for connection in connections:
                connection.close()
            if expected is None or not isinstance(error, apsw.Error):
                raise
            raise Damaged(f"{FILE} cannot be read: {error}") from error
        if expected is not None and (self.mark.token != expected.token or self.mark.seq < expected.seq):
            self.close()
            raise Damaged(f"{FILE} is not the store, or is older than the one, that the snapshot was made of")

    # --- writing: one thread

    def replace(self, removed: Iterable[int], first_row: int, added: Sequence[tuple[int, LedgerDocument]]) -> None:
        """
        Remove rows and store (operation number, document) as rows *first_row*, *first_row* + 1, …, uncommitted.

        `commit` or `rollback` ends it. Raises apsw.Error, after which it is rolled back.
        """
        rows = [
            (row, document.id, seq, document.title, document.text, orjson.dumps(document.metadata))
            for row, (seq, document) in enumerate(added, first_row)
        ]
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            self._writer.executemany("DELETE FROM documents WHERE row = ?", ((row,) for row in removed))
            self._writer.executemany(_INSERT, rows)
        except BaseException:
            self.rollback()
            raise

    def commit(self, seq: int) -> None:
        """Make what `replace` did visible to readers; *seq* is the last operation that is stored."""
        try:
            self._writer.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (str(seq),))
            self._writer.execute("COMMIT")
        except BaseException:
            self.rollback()
            raise
        self.mark = StoreMark(self.mark.token, seq)

    def rollback(self) -> None:
        """Undo what was not committed."""
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def keep_only(self, rows: BitMap, next_row: int, mark: StoreMark) -> None:
        """Remove the rows from *next_row* on and those below that are not in *rows*, and set the mark back to *mark*."""
        surplus = [row for row in self.rows() if row >= next_row or row not in rows]
        with self._writer:
            self._writer.executemany("DELETE FROM documents WHERE row = ?", ((row,) for row in surplus))
            self._writer.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (str(mark.seq),))
        self.mark = mark

    def checkpoint(self, *, full: bool = True) -> None:
        """
        Sync what was committed to disk and shorten the log.

        Where not *full*, only once the log has grown, and only as far as no reader is in the way.

        Raises:
            OSError: A reader was in the way for long.
        """
        if not full and self._log_pages < _LOG_PAGES:
            return
        mode = apsw.SQLITE_CHECKPOINT_FULL if full else apsw.SQLITE_CHECKPOINT_PASSIVE
        try:
            frames, done = self._writer.wal_checkpoint(mode=mode)
        except apsw.Error as error:
            raise OSError(f"{FILE} could not be brought to the disk: {error}") from error
        if full and done < frames:
            raise OSError(f"{FILE} is being read without end")

    # --- reading: any thread; each call is short, as a long one would keep the log from shrinking

    def fetch(self, ids: Iterable[str]) -> dict[int, ShardDocument]:
        """Return the documents of *ids* by row, without vectors; ids that are not there are missing."""
        found = self._read(
            f"SELECT row, id, text, title, metadata, seq FROM documents WHERE id IN {_LISTED}",
            (orjson.dumps(list(ids)).decode(),),
        )
        return {
            row: ShardDocument(id, text, title, orjson.loads(data), None, seq)
            for row, id, text, title, data, seq in found
        }

    def rows_of(self, ids: Iterable[str]) -> dict[str, int]:
        """Return the rows of those of *ids* that are there; what is uncommitted counts. Only for the writer."""
        found: Any = self._writer.execute(
            f"SELECT id, row FROM documents WHERE id IN {_LISTED}", (orjson.dumps(list(ids)).decode(),)
        )
        return dict(found.fetchall())

    def matches(self, rows: Sequence[int]) -> list[Match]:
        """Return id and operation number of those of *rows* that are there, by row."""
        found: list[Match] = []
        for start in range(0, len(rows), _PAGE):
            listed = orjson.dumps(rows[start : start + _PAGE]).decode()
            sql = f"SELECT id, seq FROM documents WHERE row IN {_LISTED} ORDER BY row"
            found.extend(Match(id, seq) for id, seq in self._read(sql, (listed,)))
        return found

    def texts(self, rows: Sequence[int]) -> Iterator[tuple[int, str | None, str]]:
        """Yield row, title and text of those of *rows* that are there."""
        for start in range(0, len(rows), _PAGE):
            listed = orjson.dumps([int(row) for row in rows[start : start + _PAGE]]).decode()
            sql = f"SELECT row, title, text FROM documents WHERE row IN {_LISTED}"
            yield from self._read(sql, (listed,))

    def rows(self) -> BitMap:
        """Return all rows. Raises Damaged where the file cannot be read."""
        found = BitMap()
        last = ""
        sql = f"SELECT id, row FROM documents INDEXED BY documents_by_id WHERE id > ? ORDER BY id LIMIT {_SCAN_PAGE}"
        try:
            while page := self._read(sql, (last,)):
                found.update(row for _, row in page)
                last = page[-1][0]
            return found
        except apsw.Error as error:
            raise Damaged(f"{FILE} cannot be read: {error}") from error

    @property
    def disk_bytes(self) -> int:
        """How much its files take."""
        paths = (self._path.with_name(FILE + suffix) for suffix in ("", "-wal"))
        return sum(path.stat().st_size for path in paths if path.exists())

    def close(self) -> None:
        """Close the database; nothing may be called after."""
        with self._reading:
            self._reader.close()
        self._writer.close()

    def _read(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        with self._reading:  # One connection for all readers: a shard has too many of them for handles of their own.
            return self._reader.execute(sql, values).fetchall()

    def _note_log(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _create(self) -> None:
        with self._writer:
            self._writer.execute(_SCHEMA)
            self._writer.executemany(
                "INSERT INTO meta VALUES (?, ?)", [("token", self.mark.token), ("seq", str(self.mark.seq))]
            )

    def _read_mark(self) -> StoreMark:
        rows: Any = self._writer.execute("SELECT key, value FROM meta").fetchall()
        found = dict(rows)
        try:
            return StoreMark(found["token"], int(found["seq"]))
        except (KeyError, ValueError) as error:
            raise Damaged(f"{FILE} cannot be read") from error


def remove_store(directory: Path) -> None:
    """Remove the store in *directory*, if there is one."""
    for suffix in ("", "-wal", "-shm"):
        (directory / f"{FILE}{suffix}").unlink(missing_ok=True)


def _connect(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "normal")
        connection.pragma("wal_autocheckpoint", 0)
    except BaseException:
        connection.close()
        raise
    return connection
