"""One SQLite file for the ledger: who holds it, its schema, and what its errors mean."""

import fcntl
import os
import uuid
from pathlib import Path

import apsw

from services.common.errors import Conflict, Internal, NotReady, TercetError, TooLarge, Unavailable

BUSY_TIMEOUT_MS = 5_000
WAL_LIMIT_BYTES = 64 * 2**20

# One script per schema version, never edited once released. `name` is NULL while a deleted collection is being cleared;
# a deleted document stays as a row of which only the keys and `seq` are left, so that followers see the deletion.
MIGRATIONS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE collections (
        uuid TEXT NOT NULL PRIMARY KEY,
        name TEXT UNIQUE,
        model TEXT,
        fingerprint TEXT NOT NULL,
        dim INTEGER NOT NULL,
        shards INTEGER NOT NULL,
        created_at REAL NOT NULL,
        seq INTEGER NOT NULL DEFAULT 0,
        documents INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE documents (
        collection TEXT NOT NULL REFERENCES collections (uuid),
        id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        deleted INTEGER NOT NULL,
        content_hash BLOB,
        embedded_hash BLOB,
        vector BLOB,
        title TEXT,
        metadata BLOB,
        text TEXT,
        PRIMARY KEY (collection, id),
        CHECK (deleted = (vector IS NULL) AND deleted = (text IS NULL))
    ) STRICT;
    CREATE UNIQUE INDEX documents_by_seq ON documents (collection, seq);
    """,
)


class FileLock:
    """An exclusive claim on a path, held in `<path>.lock` by this process until `release`, or until it dies."""

    def __init__(self, path: Path) -> None:
        """
        Claim *path*.

        Raises:
            Conflict: Another holder has it; the message names its process.
        """
        lock_path = path.with_name(path.name + ".lock")
        self._fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise Conflict(
                f"The ledger {path} is in use by process {holder}: stop that process, or choose another data directory"
            ) from error
        except OSError:
            os.close(self._fd)
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode("ascii"), 0)

    def release(self) -> None:
        """Give the claim up. The file stays: removing it would race with the next holder."""
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def connect(path: Path, *, readonly: bool = False) -> apsw.Connection:
    """Open a connection to *path* for one thread at a time, in WAL mode; every commit is synced to disk."""
    access = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection(str(path), flags=access)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    if not readonly:
        if connection.pragma("journal_mode", "wal") != "wal":
            raise Unavailable(f"SQLite cannot keep a write-ahead log beside {path}: choose a directory on a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    return connection


def migrate(connection: apsw.Connection, path: Path) -> str:
    """
    Bring the schema up to date, each version in a transaction of its own, and return the ledger's epoch.

    Raises:
        NotReady: A newer Tercet wrote this file.
    """
    version = int(connection.pragma("user_version"))
    if version > len(MIGRATIONS):
        raise NotReady(
            f"The ledger {path} has schema version {version}, and this Tercet knows versions up to {len(MIGRATIONS)}: "
            "start the newer Tercet that wrote it, or restore an older backup"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(script)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (str(uuid.uuid4()),))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    return str(connection.execute("SELECT value FROM meta WHERE key = 'epoch'").get)


def sync_directory(path: Path) -> None:
    """Make the names of files lately created beside *path* survive a power failure."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def explain(error: BaseException, path: Path) -> TercetError:
    """Return what *error*, raised by work on *path*, means to a caller: what is wrong and how to mend it."""
    match error:
        case TercetError():
            return error
        case apsw.FullError():
            return Unavailable(f"The disk that holds the ledger {path} is full: nothing was written; free some space")
        case apsw.BusyError() | apsw.LockedError():
            return Unavailable(f"Another program keeps the ledger {path} locked: nothing was done; close that program")
        case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.CantOpenError() | PermissionError():
            return Unavailable(
                f"The ledger {path} cannot be opened for writing: let this user write the file and its directory"
            )
        case apsw.CorruptError() | apsw.NotADBError():
            return Internal(f"The ledger {path} is damaged or is not a ledger: restore it from a backup ({error})")
        case apsw.IOError() | apsw.NoMemError() | OSError() | MemoryError():
            return Unavailable(
                f"The ledger {path} could not be read or written: nothing was changed; "
                f"check the disk, its quota and the memory ({error})"
            )
        case apsw.TooBigError():
            return TooLarge("A document is larger than the ledger can hold: split it")
        case _:
            return Internal(f"Work on the ledger {path} failed: {type(error).__name__}: {error}")
