"""The stretches of a shared ledger's history: when another begins, and what each of them shares with the present."""

import uuid
from dataclasses import dataclass

import asyncpg
import structlog

from services.search.ledger.postgres.schema import LOCK

_log = structlog.get_logger(__name__)

# Any restore or failover means another server process, another database or other tables: see PostgresLedger.
_SERVER = """
    concat_ws('/', extract(epoch FROM pg_postmaster_start_time()),
        (SELECT oid FROM pg_database WHERE datname = current_database()),
        pg_relation_filenode('collections'), pg_relation_filenode('documents'), pg_relation_filenode('epochs'))
"""
_NEWEST = f"""
    SELECT here.server, e.number, e.token, e.server = here.server AS present
    FROM (SELECT {_SERVER} AS server) AS here
        LEFT JOIN LATERAL (SELECT * FROM epochs ORDER BY number DESC LIMIT 1) AS e ON true
"""
_SEQ_AT_START = """
    SELECT s.seq FROM epoch_starts s WHERE s.collection = c.number AND s.epoch <= {epoch} ORDER BY s.epoch DESC LIMIT 1
"""
# Only collections that moved since they were last noted: the others began this epoch where they began that one.
_NOTE_STARTS = f"""
    INSERT INTO epoch_starts (collection, epoch, seq)
    SELECT c.number, $1, c.seq FROM collections c WHERE c.seq <> coalesce(({_SEQ_AT_START.format(epoch="$1")}), 0)
"""
_SHARED_SEQ = f"""
    SELECT CASE WHEN EXISTS (SELECT FROM epochs later WHERE later.number > e.number)
        THEN coalesce(({_SEQ_AT_START.format(epoch="e.number + 1")}), 0) ELSE c.seq END
    FROM epochs e, collections c WHERE e.token = $2 AND c.uuid = $1 AND c.name IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Epoch:
    """A stretch of history: its place in the order, and the token that callers know it by."""

    number: int
    token: str


async def present_epoch(connection: asyncpg.Connection, schema: str) -> Epoch:
    """Return the epoch of the server that *connection* leads to; begin one where the newest was another server's."""
    newest = await connection.fetchrow(_NEWEST)
    if newest["present"]:
        return Epoch(newest["number"], newest["token"])
    async with connection.transaction():
        await connection.fetchval(LOCK, schema)
        newest = await connection.fetchrow(_NEWEST)
        if newest["present"]:
            return Epoch(newest["number"], newest["token"])
        begun = await begin_epoch(connection)
    _log.info("ledger_epoch_begun", schema=schema, number=begun.number, epoch=begun.token)
    return begun


async def begin_epoch(connection: asyncpg.Connection) -> Epoch:
    """Begin another epoch of this server, in a transaction that has `LOCK`, and note where every collection stands."""
    newest = await connection.fetchrow(_NEWEST)
    begun = Epoch((newest["number"] or 0) + 1, str(uuid.uuid4()))
    await connection.execute(
        "INSERT INTO epochs (number, token, server) VALUES ($1, $2, $3)", begun.number, begun.token, newest["server"]
    )
    await connection.execute(_NOTE_STARTS, begun.number)
    return begun


async def shares_history(connection: asyncpg.Connection, uuid: str, epoch: str, seq: int) -> bool:
    """Whether *seq* of a collection, read in *epoch*, is no later than where that epoch ended in this history."""
    shared = await connection.fetchval(_SHARED_SEQ, uuid, epoch)
    return shared is not None and seq <= shared
