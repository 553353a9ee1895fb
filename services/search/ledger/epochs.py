"""The stretches of a SQLite ledger's history: which there were, and where each collection stood when one began."""

import time
import uuid
from typing import Any

import apsw

MAX_EPOCHS = 1_000


def begin(connection: apsw.Connection) -> str:
    """Begin another epoch, in a transaction of its own, forget all but the newest `MAX_EPOCHS`, and return its token."""
    token = str(uuid.uuid4())
    with connection:
        number: Any = connection.execute(
            "INSERT INTO epochs SELECT ifnull(max(number), 0) + 1, ?, ? FROM epochs RETURNING number",
            (token, time.time()),
        ).get
        connection.execute(
            """
            INSERT INTO epoch_seqs SELECT number, ?, seq FROM collections WHERE seq <> ifnull(
                (SELECT e.seq FROM epoch_seqs e WHERE e.collection = number ORDER BY e.epoch DESC LIMIT 1), 0)
            """,
            (number,),
        )
        _forget(connection, number - MAX_EPOCHS)
    return token


def _forget(connection: apsw.Connection, last: int) -> None:
    # What tells where a collection stands now stays, however long ago it moved there.
    connection.execute("DELETE FROM epochs WHERE number <= ?", (last,))
    connection.execute(
        """
        DELETE FROM epoch_seqs WHERE epoch <= ?1 AND EXISTS (
            SELECT 1 FROM epoch_seqs later WHERE later.collection = epoch_seqs.collection
            AND later.epoch > epoch_seqs.epoch AND later.epoch <= ?1 + 1)
        """,
        (last,),
    )


def shares_history(connection: apsw.Connection, collection_uuid: str, token: str, seq: int) -> bool:
    """Whether operations up to *seq* of a collection, read in the epoch of that *token*, are in this file's history."""
    found: list[Any] = connection.execute(
        """
        SELECT c.number, c.seq, e.number, (SELECT max(number) FROM epochs) FROM collections c, epochs e
        WHERE c.uuid = ? AND c.name IS NOT NULL AND e.token = ?
        """,
        (collection_uuid, token),
    ).fetchall()
    if not found:
        return False
    collection, end, epoch, current = found[0]
    if epoch < current:
        end = connection.execute(
            "SELECT ifnull((SELECT seq FROM epoch_seqs WHERE collection = ? AND epoch <= ? ORDER BY epoch DESC LIMIT 1), 0)",
            (collection, epoch + 1),
        ).get
    return bool(seq <= end)
