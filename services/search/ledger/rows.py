"""
How documents lie in SQLite's rows, and the statements that read and write them.

Many rows travel in one step of SQLite: it gives the interpreter's lock up for each step, and where other threads are
busy a step waits up to a switch interval (5 ms) to get it back.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apsw
import orjson

from services.common.errors import Conflict, InvalidInput
from services.search.ledger.catalogue import number_of
from services.search.ledger.encoding import decode_vectors, encode, gone
from services.search.ledger.schema import MAX_SEQ, SEQ_BITS
from services.search.ports import NO_DOCUMENT, KnownDocument, LedgerDocument, Operation, Receipt, Vector, Written

MAX_ROWS_READ = 128  # One step's rows make one string, and SQLite's strings end at 10⁹ bytes.
MAX_ROWS_WRITTEN = 100
MAX_IDS_PER_STATEMENT = 500
MAX_TRIMMED = 5_000
MAX_RECEIPTS_FORGOTTEN = 100
RECEIPT_AGE_S = 25 * 3600.0

_ROW = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_HASHES = "hex(content_hash), hex(embedded_hash)"
# Concatenation keeps the bytes of a blob as they are, though its result is called text.
_VECTORS = "CAST(group_concat(vector, '') AS BLOB)"
_READ_DOCUMENTS = f"""
    json_group_array(json_array(place & {MAX_SEQ}, id, {_HASHES}, text, title, metadata)), {_VECTORS}
"""
_READ_KNOWN = f"json_group_array(json_array(place & {MAX_SEQ}, id, {_HASHES})), {_VECTORS}"
_READ_STANDING = f"json_group_array(json_array(place & {MAX_SEQ}, id))"


# --- reading --------------------------------------------------------------------------------------------------------


def known(connection: apsw.Connection, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
    """Return the hashes, vectors and operations of the live documents among *ids*."""
    found: dict[str, KnownDocument] = {}
    for rows, blob in _live(connection, _READ_KNOWN, number_of(connection, uuid), ids, MAX_IDS_PER_STATEMENT):
        for (seq, id_, content, embedded), vector in zip(rows, _vectors(blob, len(rows)), strict=True):
            found[id_] = KnownDocument(bytes.fromhex(content), bytes.fromhex(embedded), vector, seq)
    return found


def documents(connection: apsw.Connection, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
    """Return the live documents among *ids*."""
    found: dict[str, LedgerDocument] = {}
    for rows, blob in _live(connection, _READ_DOCUMENTS, number_of(connection, uuid), ids, MAX_ROWS_READ):
        for row, vector in zip(rows, _vectors(blob, len(rows)), strict=True):
            found[row[1]] = _document(row, vector)
    return found


def operations_after(connection: apsw.Connection, uuid: str, seq: int, limit: int) -> list[Operation]:
    """Return up to *limit* operations above *seq*, in order."""
    collection = number_of(connection, uuid)
    found: list[Operation] = []
    sql = f"""
        SELECT {_READ_DOCUMENTS} FROM (
            SELECT * FROM documents WHERE place > ? AND place <= ? ORDER BY place LIMIT ?)
    """
    while collection is not None and seq < MAX_SEQ and len(found) < limit:
        wanted = min(limit - len(found), MAX_ROWS_READ)
        page = _place(collection, seq), _place(collection, MAX_SEQ), wanted
        answer: Any = connection.execute(sql, page).fetchall()
        ((packed, blob),) = answer
        rows = orjson.loads(packed)
        vectors = iter(_vectors(blob, sum(row[4] is not None for row in rows)))
        for row in rows:
            seq = row[0]
            found.append(Operation(seq, row[1], None if row[4] is None else _document(row, next(vectors))))
        if len(rows) < wanted:
            break
    return found


def find_receipt(connection: apsw.Connection, uuid: str, key: str) -> Receipt | None:
    """Return what is kept under *key* in a collection."""
    sql = "SELECT key, digest, body, seq FROM receipts WHERE collection = ? AND key = ?"
    found: list[Any] = connection.execute(sql, (number_of(connection, uuid), key)).fetchall()
    return Receipt(*found[0]) if found else None


def _live(
    connection: apsw.Connection, columns: str, collection: int | None, ids: Iterable[str], at_once: int
) -> Iterator[tuple[list[Any], bytes | None]]:
    # The rows, each as a list that begins with seq and id, and the second column (their vectors), if *columns* has one.
    wanted = [] if collection is None else list(dict.fromkeys(ids))
    for start in range(0, len(wanted), at_once):
        chunk = wanted[start : start + at_once]
        places = ",".join("?" * len(chunk))
        sql = f"SELECT {columns} FROM documents WHERE collection = ? AND id IN ({places}) AND NOT deleted"
        answer: Any = connection.execute(sql, (collection, *chunk)).fetchall()
        packed, *blob = answer[0]
        yield orjson.loads(packed), blob[0] if blob else None


def _vectors(blob: bytes | None, count: int) -> Iterable[Vector]:
    return decode_vectors(blob or b"", count) if count else ()


def _document(row: Sequence[Any], vector: Vector) -> LedgerDocument:
    seq, id_, content, embedded, text, title, metadata = row
    hashes = bytes.fromhex(content), bytes.fromhex(embedded)
    return LedgerDocument(id_, text, title, orjson.loads(metadata), vector, *hashes, seq)


def _place(collection: int, seq: int) -> int:
    return collection << SEQ_BITS | max(0, seq)


# --- writing, inside a transaction ----------------------------------------------------------------------------------


def append(
    connection: apsw.Connection,
    uuid: str,
    upserts: Sequence[LedgerDocument],
    expected: Mapping[str, int],
    receipt: Receipt | None,
) -> Written:
    """Store *upserts*, an operation each, in order. Raises NotFound, InvalidInput or Conflict."""
    collection, seq, dim = _position(connection, uuid)
    _refuse_repeated(connection, collection, receipt)
    standing = _standing(connection, collection, [document.id for document in upserts])
    conflicts, rows, fresh = {}, [], set()
    for document in upserts:
        at = standing.get(document.id, NO_DOCUMENT)
        row = _row(document, dim)
        if document.id in fresh:
            raise InvalidInput(f"Document {document.id!r} comes twice in one write: send it once")
        if expected.get(document.id, at) != at:
            conflicts[document.id] = at
            continue
        fresh.add(document.id)
        seq += 1
        rows.append((_place(collection, seq), collection, document.id, 0, *row))
    _put(connection, rows)
    _advance(connection, collection, seq, len(fresh - standing.keys()))
    _keep(connection, collection, receipt, seq)
    return Written(seq, len(rows), conflicts)


def delete(
    connection: apsw.Connection, uuid: str, ids: Sequence[str], expected: Mapping[str, int], receipt: Receipt | None
) -> Written:
    """Turn the live documents among *ids* into tombstones, in that order. Raises NotFound or Conflict."""
    collection, seq, _ = _position(connection, uuid)
    _refuse_repeated(connection, collection, receipt)
    standing = _standing(connection, collection, ids)
    conflicts, rows = {}, []
    for id_ in dict.fromkeys(ids):
        at = standing.get(id_, NO_DOCUMENT)
        if expected.get(id_, at) != at:
            conflicts[id_] = at
        elif at != NO_DOCUMENT:
            seq += 1
            rows.append((_place(collection, seq), collection, id_, 1, None, None, None, None, None, None))
    _put(connection, rows)
    _advance(connection, collection, seq, -len(rows))
    _keep(connection, collection, receipt, seq)
    return Written(seq, len(rows), conflicts)


def trim(connection: apsw.Connection, uuid: str, seq: int) -> int:
    """Remove up to `MAX_TRIMMED` tombstones numbered up to *seq*, the oldest first, and old receipts; return how many."""
    _forget_receipts(connection)
    collection = number_of(connection, uuid)
    if collection is None:
        return 0
    chosen = (
        f"SELECT place FROM documents WHERE deleted AND place >= ? AND place <= ? ORDER BY place LIMIT {MAX_TRIMMED}"
    )
    bounds = _place(collection, 0), _place(collection, min(seq, MAX_SEQ))
    last = connection.execute(f"SELECT max(place) FROM ({chosen})", bounds).get
    if last is None:
        return 0
    connection.execute("DELETE FROM documents WHERE deleted AND place >= ? AND place <= ?", (bounds[0], last))
    removed = connection.changes()
    connection.execute(
        "UPDATE collections SET trimmed_seq = max(trimmed_seq, ?) WHERE number = ?", (last & MAX_SEQ, collection)
    )
    return removed


def _position(connection: apsw.Connection, uuid: str) -> tuple[int, int, int]:
    sql = "SELECT number, seq, dim FROM collections WHERE uuid = ? AND name IS NOT NULL"
    found: list[Any] = connection.execute(sql, (uuid,)).fetchall()
    if not found:
        raise gone(uuid)
    number, seq, dim = found[0]
    return number, seq, dim


def _standing(connection: apsw.Connection, collection: int, ids: Iterable[str]) -> dict[str, int]:
    """Return the operation at which each live document of *ids* stands."""
    try:
        found = list(_live(connection, _READ_STANDING, collection, ids, MAX_IDS_PER_STATEMENT))
    except UnicodeEncodeError as error:
        raise InvalidInput(f"A document's id is not valid text: {error}") from error
    return {id_: seq for rows, _ in found for seq, id_ in rows}


def _put(connection: apsw.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    # REPLACE removes the document's former row, which the index on ids finds.
    for start in range(0, len(rows), MAX_ROWS_WRITTEN):
        chunk = rows[start : start + MAX_ROWS_WRITTEN]
        places = ",".join([_ROW] * len(chunk))
        connection.execute(
            f"INSERT OR REPLACE INTO documents VALUES {places}", [value for row in chunk for value in row]
        )


def _advance(connection: apsw.Connection, collection: int, seq: int, documents_more: int) -> None:
    connection.execute(
        "UPDATE collections SET seq = ?, documents = documents + ? WHERE number = ?", (seq, documents_more, collection)
    )


def _refuse_repeated(connection: apsw.Connection, collection: int, receipt: Receipt | None) -> None:
    sql = "SELECT 1 FROM receipts WHERE collection = ? AND key = ?"
    if receipt and connection.execute(sql, (collection, receipt.key)).get:
        raise Conflict(f"A write with the idempotency key {receipt.key!r} was made before: nothing was done again")


def _keep(connection: apsw.Connection, collection: int, receipt: Receipt | None, seq: int) -> None:
    if receipt is not None:
        connection.execute(
            "INSERT INTO receipts (collection, key, digest, body, seq, written_at) VALUES (?, ?, ?, ?, ?, ?)",
            (collection, receipt.key, receipt.digest, receipt.body, seq, time.time()),
        )
        _forget_receipts(connection)


def _forget_receipts(connection: apsw.Connection) -> None:
    connection.execute(
        "DELETE FROM receipts WHERE rowid IN (SELECT rowid FROM receipts WHERE written_at < ? LIMIT ?)",
        (time.time() - RECEIPT_AGE_S, MAX_RECEIPTS_FORGOTTEN),
    )


def _row(document: LedgerDocument, dim: int) -> tuple[Any, ...]:
    encoded = encode(document, dim)
    hashes = encoded.content_hash, encoded.embedded_hash
    return *hashes, document.title, encoded.metadata.decode(), document.text, encoded.vector
