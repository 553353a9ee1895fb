"""Everything in a SQLite ledger, read row by row as it is kept, for who moves it to another database."""

from collections.abc import Iterator
from typing import Any

import apsw

from services.search.ledger.catalogue import number_of
from services.search.ledger.encoding import StoredOperation, StoredReceipt
from services.search.ledger.schema import MAX_SEQ, SEQ_BITS

# As blobs: text that is cast keeps its bytes, also U+0000 among them.
_OPERATIONS = f"""
    SELECT place & {MAX_SEQ}, CAST(id AS BLOB), CAST(text AS BLOB), CAST(title AS BLOB), CAST(metadata AS BLOB), vector,
        content_hash, embedded_hash
    FROM documents WHERE place >= ? AND place < ? ORDER BY place
"""
_RECEIPTS = """
    SELECT CAST(key AS BLOB), digest, body, seq, written_at FROM receipts WHERE collection = ? ORDER BY key
"""


def operations(connection: apsw.Connection, uuid: str) -> Iterator[StoredOperation]:
    """Yield the operations of a live collection, by number."""
    number = number_of(connection, uuid)
    if number is not None:
        rows: Any = connection.execute(_OPERATIONS, (number << SEQ_BITS, (number + 1) << SEQ_BITS))
        yield from map(StoredOperation._make, rows)


def receipts(connection: apsw.Connection, uuid: str) -> Iterator[StoredReceipt]:
    """Yield the receipts of a live collection, by the bytes of their keys."""
    rows: Any = connection.execute(_RECEIPTS, (number_of(connection, uuid),))
    yield from map(StoredReceipt._make, rows)
