"""
The stored fields of a shard's rows: SQLite in the shard's directory.

All of it is derived from the ledger, so it starts empty and is never synced to disk.
"""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import apsw
import orjson

from services.search.ports import LedgerDocument, ShardDocument

_FILE = "documents.sqlite"
_BUSY_TIMEOUT_MS = 10_000


class ShardStore:
    """
    Title, text and metadata by row. One writer and many readers may use it at once.

    Opening it removes what an earlier one left in *directory*.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix in ("", "-wal", "-shm"):
            (directory / f"{_FILE}{suffix}").unlink(missing_ok=True)
        self._writer = self._connect(directory / _FILE)
        self._writer.execute(
            "CREATE TABLE documents (row INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT, text TEXT NOT NULL, "
            "metadata BLOB NOT NULL)"
        )
        # One connection for all readers: a shard has too many reading threads for file handles of their own.
        self._reader = self._connect(directory / _FILE)
        self._reading = threading.Lock()

    def add(self, first_row: int, documents: Sequence[LedgerDocument]) -> None:
        """Store *documents* as rows *first_row*, *first_row* + 1, …, all or none."""
        with self._writer:
            self._writer.executemany(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?)",
                (
                    (row, document.id, document.title, document.text, orjson.dumps(document.metadata))
                    for row, document in enumerate(documents, first_row)
                ),
            )

    def remove(self, rows: Iterable[int]) -> None:
        """Remove *rows*, all or none; rows that are not there are passed over."""
        with self._writer:
            self._writer.executemany("DELETE FROM documents WHERE row = ?", ((row,) for row in rows))

    def fetch(self, rows: Iterable[int]) -> dict[int, ShardDocument]:
        """Return the documents of *rows*, without vectors; rows that are not there are missing."""
        with self._reading:
            found: list[Any] = self._reader.execute(
                "SELECT row, id, text, title, metadata FROM documents WHERE row IN (SELECT value FROM json_each(?))",
                (orjson.dumps(list(rows)).decode(),),
            ).fetchall()
        return {row: ShardDocument(id, text, title, orjson.loads(data)) for row, id, text, title, data in found}

    def close(self) -> None:
        """Close the database; nothing may be called after."""
        with self._reading:
            self._reader.close()
        self._writer.close()

    @staticmethod
    def _connect(path: Path) -> apsw.Connection:
        connection = apsw.Connection(str(path))
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = OFF")
        return connection
