"""How documents lie in PostgreSQL's rows, and the statements that read and write them."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import asyncpg
import orjson

from services.common.errors import Conflict
from services.search.ledger.encoding import decode_vectors, encode, gone
from services.search.ports import (
    NO_DOCUMENT,
    CollectionState,
    KnownDocument,
    LedgerDocument,
    Operation,
    Receipt,
    Written,
)

MAX_CLEARED = 2_000
RECEIPTS_KEPT = "interval '25 hours'"  # a day, and a margin for a retry that began within it

_DOCUMENT = "id, text, title, metadata, vector, content_hash, embedded_hash"
_LIVE_COLLECTION = "(SELECT number FROM collections WHERE uuid = $1 AND name IS NOT NULL)"

_UPSERT = f"""
    INSERT INTO documents (collection, seq, {_DOCUMENT})
    SELECT $1, * FROM
        unnest($2::bigint[], $3::bytea[], $4::bytea[], $5::bytea[], $6::bytea[], $7::bytea[], $8::bytea[], $9::bytea[])
    ON CONFLICT (collection, id) DO UPDATE SET
        seq = excluded.seq, text = excluded.text, title = excluded.title, metadata = excluded.metadata,
        vector = excluded.vector, content_hash = excluded.content_hash, embedded_hash = excluded.embedded_hash
"""
_BURY = """
    UPDATE documents d SET seq = doomed.seq, text = NULL, title = NULL, metadata = NULL, vector = NULL,
        content_hash = NULL, embedded_hash = NULL
    FROM unnest($2::bigint[], $3::bytea[]) AS doomed (seq, id) WHERE d.collection = $1 AND d.id = doomed.id
"""
_ADVANCE = """
    UPDATE collections SET seq = seq + $2, documents = documents + $3 WHERE number = $1
    RETURNING pg_notify($4, uuid || ':' || seq || ':' || $5)
"""
_TRIM = """
    WITH gone AS (DELETE FROM documents WHERE collection = $1 AND seq <= $2 AND text IS NULL RETURNING seq),
        noted AS (UPDATE collections SET trimmed_seq = greatest(trimmed_seq, (SELECT max(seq) FROM gone)) WHERE number = $1)
    SELECT count(*) FROM gone
"""
_CLEAR = """
    DELETE FROM documents WHERE ctid = ANY (ARRAY(
        SELECT d.ctid FROM documents d JOIN collections c ON c.number = d.collection WHERE c.name IS NULL
        LIMIT $1 FOR UPDATE OF d SKIP LOCKED))
"""
_CLEAR_COLLECTIONS = """
    DELETE FROM collections c WHERE name IS NULL AND NOT EXISTS (SELECT FROM documents WHERE collection = c.number)
"""


# --- reading --------------------------------------------------------------------------------------------------------


async def state(connection: asyncpg.Connection, uuid: str) -> CollectionState:
    """Return where a collection stands. Raises NotFound."""
    sql = "SELECT seq, documents, trimmed_seq FROM collections WHERE uuid = $1 AND name IS NOT NULL"
    found = await connection.fetchrow(sql, uuid)
    if found is None:
        raise gone(uuid)
    return CollectionState(*found)


async def known(connection: asyncpg.Connection, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
    """Return the hashes, vectors and operations of the live documents among *ids*."""
    columns = "id, content_hash, embedded_hash, vector, seq"
    return {
        id_.decode(): KnownDocument(content_hash, embedded_hash, decode_vectors(vector)[0], seq)
        for id_, content_hash, embedded_hash, vector, seq in await _live(connection, columns, uuid, ids)
    }


async def documents(connection: asyncpg.Connection, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
    """Return the live documents among *ids*."""
    found = [_document(seq, row) for seq, *row in await _live(connection, f"seq, {_DOCUMENT}", uuid, ids)]
    return {document.id: document for document in found}


async def operations_after(connection: asyncpg.Connection, uuid: str, seq: int, limit: int) -> list[Operation]:
    """Return up to *limit* operations above *seq*, in order."""
    sql = f"""
        SELECT seq, {_DOCUMENT} FROM documents WHERE collection = {_LIVE_COLLECTION} AND seq > $2 ORDER BY seq LIMIT $3
    """
    return [
        Operation(number, row[0].decode(), None if row[1] is None else _document(number, row))
        for number, *row in await connection.fetch(sql, uuid, seq, limit)
    ]


async def find_receipt(connection: asyncpg.Connection, uuid: str, key: str) -> Receipt | None:
    """Return what was kept under *key*."""
    sql = f"SELECT digest, body, seq FROM receipts WHERE collection = {_LIVE_COLLECTION} AND key = $2"
    found = await connection.fetchrow(sql, uuid, key.encode())
    return found and Receipt(key, *found)


async def _live(connection: asyncpg.Connection, columns: str, uuid: str, ids: Sequence[str]) -> list[Any]:
    sql = f"""
        SELECT {columns} FROM documents
        WHERE collection = {_LIVE_COLLECTION} AND id = ANY ($2::bytea[]) AND text IS NOT NULL
    """
    found: list[Any] = await connection.fetch(sql, uuid, [_id(id_) for id_ in ids])
    return found


def _document(seq: int, row: Sequence[Any]) -> LedgerDocument:
    id_, text, title, metadata, vector, content_hash, embedded_hash = row
    return LedgerDocument(
        id_.decode(),
        text.decode(),
        None if title is None else title.decode(),
        orjson.loads(metadata),
        decode_vectors(vector)[0],
        content_hash,
        embedded_hash,
        seq,
    )


# --- writing, inside a transaction ----------------------------------------------------------------------------------


class Change:
    """
    A transaction's work on one collection, whose row it keeps locked until the transaction ends.

    So numbers are taken in commit order: whoever sees an operation sees every one before it.
    """

    def __init__(self, connection: asyncpg.Connection, channel: str, origin: str) -> None:
        """Work through *connection*, and announce what was done on *channel* as done by *origin*."""
        self._connection = connection
        self._channel = channel
        self._origin = origin
        self._number = self._seq = self._dim = 0

    async def begin(self, uuid: str) -> None:
        """Lock the collection. Raises NotFound."""
        sql = "SELECT number, seq, dim FROM collections WHERE uuid = $1 AND name IS NOT NULL FOR NO KEY UPDATE"
        found = await self._connection.fetchrow(sql, uuid)
        if found is None:
            raise gone(uuid)
        self._number, self._seq, self._dim = found

    async def append(
        self, upserts: Sequence[LedgerDocument], expected: Mapping[str, int], receipt: Receipt | None
    ) -> Written:
        """Store *upserts*, except those that stand at another operation than *expected*."""
        rows = {document.id: encode(document, self._dim) for document in upserts}
        standing = await self._standing(list(rows))
        conflicts = _conflicts(expected, standing, rows)
        stored = [document.id for document in upserts if document.id not in conflicts]
        # Where a batch repeats an id, each takes a number and the last of them holds.
        seqs = {id_: seq for seq, id_ in enumerate(stored, start=self._seq + 1)}
        columns = zip(*(rows[id_] for id_ in seqs), strict=True)
        if seqs:
            await self._connection.execute(_UPSERT, self._number, list(seqs.values()), *(list(c) for c in columns))
        await self._finish(len(stored), len(seqs) - len(seqs.keys() & standing.keys()), receipt)
        return Written(self._seq, len(stored), conflicts)

    async def delete(self, ids: Sequence[str], expected: Mapping[str, int], receipt: Receipt | None) -> Written:
        """Turn the live documents among *ids* into tombstones, in that order, except those not as *expected*."""
        wanted = list(dict.fromkeys(ids))
        standing = await self._standing(wanted)
        conflicts = _conflicts(expected, standing, wanted)
        doomed = [id_ for id_ in wanted if id_ in standing and id_ not in conflicts]
        if doomed:
            seqs = list(range(self._seq + 1, self._seq + len(doomed) + 1))
            await self._connection.execute(_BURY, self._number, seqs, [_id(id_) for id_ in doomed])
        await self._finish(len(doomed), -len(doomed), receipt)
        return Written(self._seq, len(doomed), conflicts)

    async def trim(self, seq: int) -> int:
        """Remove tombstones numbered up to *seq*, and receipts older than a day; return how many tombstones."""
        trimmed: int = await self._connection.fetchval(_TRIM, self._number, seq)
        sql = f"DELETE FROM receipts WHERE collection = $1 AND kept_at < now() - {RECEIPTS_KEPT}"
        await self._connection.execute(sql, self._number)
        return trimmed

    async def _standing(self, ids: Sequence[str]) -> dict[str, int]:
        if not ids:
            return {}
        sql = "SELECT id, seq FROM documents WHERE collection = $1 AND id = ANY ($2::bytea[]) AND text IS NOT NULL"
        found = await self._connection.fetch(sql, self._number, [_id(id_) for id_ in ids])
        return {id_.decode(): seq for id_, seq in found}

    async def _finish(self, operations: int, documents_more: int, receipt: Receipt | None) -> None:
        self._seq += operations
        if receipt is not None:
            sql = """
                INSERT INTO receipts (collection, key, digest, body, seq) VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT DO NOTHING RETURNING 1
            """
            values = (self._number, receipt.key.encode(), receipt.digest, receipt.body, self._seq)
            if await self._connection.fetchval(sql, *values) is None:
                raise Conflict(
                    f"There is a receipt under the idempotency key {receipt.key!r} already: nothing was done"
                )
        if operations:
            await self._connection.fetchval(
                _ADVANCE, self._number, operations, documents_more, self._channel, self._origin
            )


async def clear(connection: asyncpg.Connection) -> bool:
    """Remove some rows of dropped collections; False when nothing is left that nobody else is removing."""
    if _count(await connection.execute(_CLEAR, MAX_CLEARED)) > 0:
        return True
    await connection.execute(_CLEAR_COLLECTIONS)
    return False


def _conflicts(expected: Mapping[str, int], standing: Mapping[str, int], ids: Container[str]) -> dict[str, int]:
    return {
        id_: standing.get(id_, NO_DOCUMENT)
        for id_, seq in expected.items()
        if id_ in ids and standing.get(id_, NO_DOCUMENT) != seq
    }


def _id(id_: str) -> bytes:
    # An id that is no Unicode is no document's: encoded like this it equals none.
    return id_.encode(errors="surrogatepass")


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])
