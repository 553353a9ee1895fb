"""How documents and collections lie in SQLite's rows, and the statements that read and write them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apsw
import numpy as np
import orjson

from services.common.errors import Conflict, InvalidInput, NotFound
from services.search.ports import Collection, CollectionState, KnownDocument, LedgerDocument, Operation, Vector

MAX_IDS_PER_STATEMENT = 500
MAX_CLEARED = 500

_COLLECTION = "uuid, name, model, fingerprint, dim, shards, created_at"
_DOCUMENT = "id, text, title, metadata, vector, content_hash, embedded_hash"
_LIVE_COLLECTION = "(SELECT uuid FROM collections WHERE uuid = ? AND name IS NOT NULL)"

_UPSERT = """
    INSERT INTO documents (collection, seq, deleted, id, text, title, metadata, vector, content_hash, embedded_hash)
    VALUES (?, ?, 0, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (collection, id) DO UPDATE SET
        seq = excluded.seq, deleted = 0, text = excluded.text, title = excluded.title, metadata = excluded.metadata,
        vector = excluded.vector, content_hash = excluded.content_hash, embedded_hash = excluded.embedded_hash
"""
_BURY = """
    UPDATE documents SET seq = ?, deleted = 1, text = NULL, title = NULL, metadata = NULL, vector = NULL,
        content_hash = NULL, embedded_hash = NULL
    WHERE collection = ? AND id = ?
"""


# --- reading --------------------------------------------------------------------------------------------------------


def collections(connection: apsw.Connection, name: str | None = None) -> list[Collection]:
    """Return the live collections by name, or only the one called *name*."""
    chosen = "name IS NOT NULL" if name is None else "name = ?"
    sql = f"SELECT {_COLLECTION} FROM collections WHERE {chosen} ORDER BY name"
    return [Collection(*row) for row in connection.execute(sql, () if name is None else (name,))]


def state(connection: apsw.Connection, uuid: str) -> CollectionState:
    """Return where a collection stands. Raises NotFound."""
    sql = "SELECT seq, documents FROM collections WHERE uuid = ? AND name IS NOT NULL"
    found: list[Any] = connection.execute(sql, (uuid,)).fetchall()
    if not found:
        raise _gone(uuid)
    return CollectionState(*found[0])


def known(connection: apsw.Connection, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
    """Return the hashes and vectors of the live documents among *ids*."""
    return {
        id_: KnownDocument(content_hash, embedded_hash, _vector(blob))
        for id_, content_hash, embedded_hash, blob in _live(
            connection, "id, content_hash, embedded_hash, vector", uuid, ids
        )
    }


def documents(connection: apsw.Connection, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
    """Return the live documents among *ids*."""
    return {row[0]: _document(row) for row in _live(connection, _DOCUMENT, uuid, ids)}


def operations_after(connection: apsw.Connection, uuid: str, seq: int, limit: int) -> list[Operation]:
    """Return up to *limit* operations above *seq*, in order."""
    sql = f"""
        SELECT seq, deleted, {_DOCUMENT} FROM documents
        WHERE collection = {_LIVE_COLLECTION} AND seq > ? ORDER BY seq LIMIT ?
    """
    return [
        Operation(number, row[0], None if deleted else _document(row))
        for number, deleted, *row in connection.execute(sql, (uuid, seq, limit))
    ]


def _live(connection: apsw.Connection, columns: str, uuid: str, ids: Iterable[str]) -> Iterator[Any]:
    wanted = list(dict.fromkeys(ids))
    for start in range(0, len(wanted), MAX_IDS_PER_STATEMENT):
        chunk = wanted[start : start + MAX_IDS_PER_STATEMENT]
        places = ",".join("?" * len(chunk))
        sql = f"""
            SELECT {columns} FROM documents
            WHERE collection = {_LIVE_COLLECTION} AND id IN ({places}) AND NOT deleted
        """
        yield from connection.execute(sql, (uuid, *chunk))


def _document(row: Sequence[Any]) -> LedgerDocument:
    id_, text, title, metadata, vector, content_hash, embedded_hash = row
    return LedgerDocument(id_, text, title, orjson.loads(metadata), _vector(vector), content_hash, embedded_hash)


def _vector(blob: bytes) -> Vector:
    return np.frombuffer(blob, dtype="<f4").astype(np.float32, copy=False)


# --- writing, inside a transaction ----------------------------------------------------------------------------------


def create(connection: apsw.Connection, collection: Collection) -> None:
    """Add *collection*. Raises Conflict when its name or its uuid is taken."""
    taken = connection.execute(
        "SELECT 1 FROM collections WHERE name = ? OR uuid = ?", (collection.name, collection.uuid)
    ).get
    if taken:
        raise Conflict(f"There is a collection {collection.name!r} already: choose another name, or delete it first")
    connection.execute(
        f"INSERT INTO collections ({_COLLECTION}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            collection.uuid,
            collection.name,
            collection.model,
            collection.fingerprint,
            collection.dim,
            collection.shards,
            collection.created_at,
        ),
    )


def drop(connection: apsw.Connection, uuid: str) -> bool:
    """Make a collection and its documents disappear from all reads at once; `clear` then frees their space."""
    connection.execute("UPDATE collections SET name = NULL WHERE uuid = ? AND name IS NOT NULL", (uuid,))
    return connection.changes() > 0


def clear(connection: apsw.Connection) -> bool:
    """Remove some rows of dropped collections; False when nothing is left to remove."""
    connection.execute(
        """
        DELETE FROM documents WHERE rowid IN (
            SELECT d.rowid FROM collections c JOIN documents d ON d.collection = c.uuid WHERE c.name IS NULL LIMIT ?)
        """,
        (MAX_CLEARED,),
    )
    if connection.changes() > 0:
        return True
    connection.execute("DELETE FROM collections WHERE name IS NULL")
    return False


def append(connection: apsw.Connection, uuid: str, upserts: Sequence[LedgerDocument]) -> int:
    """Store *upserts*, an operation each, in order; return the last number. Raises NotFound or InvalidInput."""
    seq, dim = _position(connection, uuid)
    ids = {document.id for document in upserts}
    rows = [(uuid, number, *_row(document, dim)) for number, document in enumerate(upserts, start=seq + 1)]
    live_before = sum(1 for _ in _live(connection, "1", uuid, ids))
    connection.executemany(_UPSERT, rows)
    _advance(connection, uuid, len(rows), len(ids) - live_before)
    return seq + len(rows)


def delete(connection: apsw.Connection, uuid: str, ids: Sequence[str]) -> tuple[int, int]:
    """Turn the live documents among *ids* into tombstones, in that order; return (how many, the last number)."""
    seq, _ = _position(connection, uuid)
    live = {row[0] for row in _live(connection, "id", uuid, ids)}
    doomed = [id_ for id_ in dict.fromkeys(ids) if id_ in live]
    connection.executemany(_BURY, [(number, uuid, id_) for number, id_ in enumerate(doomed, start=seq + 1)])
    _advance(connection, uuid, len(doomed), -len(doomed))
    return len(doomed), seq + len(doomed)


def _position(connection: apsw.Connection, uuid: str) -> tuple[int, int]:
    sql = "SELECT seq, dim FROM collections WHERE uuid = ? AND name IS NOT NULL"
    found: list[Any] = connection.execute(sql, (uuid,)).fetchall()
    if not found:
        raise _gone(uuid)
    seq, dim = found[0]
    return seq, dim


def _advance(connection: apsw.Connection, uuid: str, operations: int, documents_more: int) -> None:
    connection.execute(
        "UPDATE collections SET seq = seq + ?, documents = documents + ? WHERE uuid = ?",
        (operations, documents_more, uuid),
    )


def _row(document: LedgerDocument, dim: int) -> tuple[Any, ...]:
    if document.vector.shape != (dim,):
        raise InvalidInput(
            f"The vector of document {document.id!r} has shape {list(document.vector.shape)}, "
            f"and the collection holds vectors of {dim} numbers",
            param="vector",
        )
    try:
        document.id.encode()
        document.text.encode()
        (document.title or "").encode()
        metadata = orjson.dumps(dict(document.metadata))
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidInput(f"Document {document.id!r} cannot be stored: {error}") from error
    vector = document.vector.astype("<f4", copy=False).tobytes()
    return (
        document.id,
        document.text,
        document.title,
        metadata,
        vector,
        document.content_hash,
        document.embedded_hash,
    )


def _gone(uuid: str) -> NotFound:
    return NotFound(f"There is no collection with the uuid {uuid}: it may have been deleted meanwhile")
