"""One SQLite file for the ledger: who holds it, how it is opened, and what its errors mean."""

import os
from pathlib import Path

import apsw

from services.common.errors import Internal, TercetError, TooLarge, Unavailable

BUSY_TIMEOUT_MS = 5_000
PAGE_BYTES = 8192
CACHE_BYTES = 32 * 2**20
WAL_LIMIT_BYTES = 64 * 2**20


def connect(path: Path, *, readonly: bool = False, vfs: str | None = None) -> apsw.Connection:
    """
    Open a connection to *path* for one thread at a time, in WAL mode; every commit is synced to disk.

    *vfs* names the SQLite VFS to go through, if not SQLite's own.
    """
    access = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection(str(path), flags=access, vfs=vfs)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        if not readonly:
            _prepare_to_write(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare_to_write(connection: apsw.Connection, path: Path) -> None:
    connection.pragma("page_size", PAGE_BYTES)  # Of a new file: the pages of one that exists stay as they are.
    if connection.pragma("journal_mode", "wal") != "wal":
        raise Unavailable(f"SQLite cannot keep a write-ahead log beside {path}: choose a directory on a local disk")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA cache_size = -{CACHE_BYTES // 1024}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")


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
                f"The ledger {path} could not be read or written: check the disk, its quota and the memory ({error})"
            )
        case apsw.TooBigError():
            return TooLarge("A document is larger than the ledger can hold: split it")
        case _:
            return Internal(f"Work on the ledger {path} failed: {type(error).__name__}: {error}")
