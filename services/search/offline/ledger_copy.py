"""A consistent copy of the SQLite ledger, taken beside the service that writes it."""

from pathlib import Path

import apsw

from services.search.ledger.connection import connect, explain
from services.search.ledger.schema import MIGRATIONS
from services.search.offline.errors import BackupError, OfflineError
from services.search.offline.layout import CollectionMark


def copy_ledger(source: Path, target: Path) -> list[CollectionMark]:
    """
    Copy the ledger *source* as of one moment into a new file *target*, compacted and checked; return its collections.

    The service that has it open goes on reading and writing; only its log cannot shrink meanwhile.

    Raises:
        BackupError: It cannot be read, or is damaged.
        OfflineError: Another version of Tercet wrote it.
    """
    try:
        reader = connect(source, readonly=True)
        try:
            check_version(reader, source)
            reader.execute("VACUUM INTO ?", (str(target),))
        finally:
            reader.close()
        return _checked(target)
    except apsw.Error as error:
        raise BackupError(str(explain(error, source))) from error


def check_version(connection: apsw.Connection, path: Path) -> None:
    """Raise OfflineError where another version of Tercet wrote the ledger *path*."""
    version, known = int(connection.pragma("user_version")), len(MIGRATIONS)
    if version > known:
        raise OfflineError(f"A newer Tercet wrote the ledger {path}: use that one")
    if version < known:
        raise OfflineError(f"An older Tercet wrote the ledger {path}: start the search service once, which converts it")


def _checked(path: Path) -> list[CollectionMark]:
    copy = connect(path, readonly=True)
    try:
        found = [str(line) for (line,) in copy.execute("PRAGMA quick_check")]
        if found != ["ok"]:
            raise BackupError(f"The copy of the ledger is damaged, so the ledger may be: {'; '.join(found[:3])}")
        sql = "SELECT uuid, name, documents, seq FROM collections WHERE name IS NOT NULL ORDER BY name"
        return [
            CollectionMark(uuid=str(uuid), name=str(name), documents=int(documents), seq=int(seq))
            for uuid, name, documents, seq in copy.execute(sql)
        ]
    finally:
        copy.close()
