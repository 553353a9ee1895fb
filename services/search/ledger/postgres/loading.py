"""Filling an empty shared ledger with all that another one holds, in one transaction, and reading it back to compare."""

import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import asyncpg

from services.common.errors import Conflict
from services.search.ledger.encoding import StoredOperation, StoredReceipt
from services.search.ledger.postgres import epochs, names, rows
from services.search.ledger.postgres.connections import Address, connect, insist_on_durability
from services.search.ledger.postgres.failures import explain
from services.search.ledger.postgres.schema import LOCK, migrate
from services.search.ports import Collection, CollectionState

PIECE_BYTES = 256 * 1024

# A ledger may take as long as it takes to be read; a machine that is lost with its end of the connection is noticed all the same.
_SESSION = """
    SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = 0;
    SET LOCAL tcp_keepalives_idle = 60;
    SET LOCAL tcp_keepalives_interval = 10;
    SET LOCAL tcp_keepalives_count = 6;
"""

# PostgreSQL's manual, COPY, "Binary Format".
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = struct.pack("!h", -1)
_NULL = struct.pack("!i", -1)
_EPOCH_S = 946_684_800  # A timestamp is in microseconds since the beginning of 2000, UTC.

Field = bytes | None


@dataclass(frozen=True, slots=True)
class Mark:
    """How many rows a collection has in a table, and a digest of all of them, in order, without its number there."""

    rows: int
    digest: str


Marks = tuple[Mark, Mark]  # Of a collection's operations, and of its receipts.


class _Table(NamedTuple):
    """A table of collections' rows: its columns but for `collection`, and the one by which they are in order."""

    name: str
    columns: tuple[str, ...]
    order: str
    fields: Callable[[Any], Sequence[Field]]


def _operation_fields(operation: StoredOperation) -> Sequence[Field]:
    return struct.pack("!q", operation.seq), *operation[1:]


def _receipt_fields(receipt: StoredReceipt) -> Sequence[Field]:
    kept_at = round((receipt.written_at - _EPOCH_S) * 1_000_000)
    return receipt.key, receipt.digest, receipt.body, struct.pack("!q", receipt.seq), struct.pack("!q", kept_at)


_OPERATIONS = _Table("documents", StoredOperation._fields, "seq", _operation_fields)
_RECEIPTS = _Table("receipts", ("key", "digest", "body", "seq", "kept_at"), "key", _receipt_fields)


class Loading:
    """The transaction that fills a ledger; nobody else sees any of it before it ends, and its names stay locked."""

    def __init__(self, connection: asyncpg.Connection, address: Address, *, durable: bool) -> None:
        """Work through *connection*; `loading` is the way to make one."""
        self._connection = connection
        self._address = address
        self.durable = durable

    @property
    def place(self) -> str:
        """Where the ledger is, without the password."""
        return self._address.place

    async def empty(self) -> bool:
        """Whether there is no collection, nor a part of a deleted one."""
        sql = "SELECT NOT EXISTS (SELECT FROM collections) AND NOT EXISTS (SELECT FROM documents)"
        return bool(await self._connection.fetchval(sql))

    async def collections(self) -> list[tuple[Collection, CollectionState]]:
        """Return the collections by name, and where each stands."""
        found = await names.collections(self._connection)
        return [(collection, await rows.state(self._connection, collection.uuid)) for collection in found]

    async def aliases(self) -> dict[str, str]:
        """Return all aliases, by name, each with the name of its collection."""
        return await names.aliases(self._connection)

    async def begin_epoch(self) -> None:
        """Begin another epoch, so that nothing derived from a ledger of before is taken for a part of this one."""
        await epochs.begin_epoch(self._connection)

    async def fill(
        self,
        collection: Collection,
        state: CollectionState,
        operations: Iterable[StoredOperation],
        receipts: Iterable[StoredReceipt],
    ) -> Marks:
        """
        Add *collection* as it stands with all its rows; return what was sent of both kinds.

        Operations come by number, receipts by key. No more than a row and `PIECE_BYTES` of them are kept in memory.
        """
        await names.create(self._connection, self._address.schema, collection)
        sql = """
            UPDATE collections SET seq = $2, documents = $3, trimmed_seq = $4 WHERE uuid = $1 RETURNING number
        """
        number = await self._connection.fetchval(sql, collection.uuid, state.seq, state.documents, state.trimmed_seq)
        return await self._send(_OPERATIONS, number, operations), await self._send(_RECEIPTS, number, receipts)

    async def set_aliases(self, aliases: Mapping[str, str]) -> None:
        """Let each alias mean the collection named."""
        await names.set_aliases(self._connection, self._address.schema, aliases)

    async def marks(self, uuid: str) -> Marks:
        """Read the operations and receipts of a collection back, and return what they are."""
        number = await self._connection.fetchval("SELECT number FROM collections WHERE uuid = $1", uuid)
        return await self._read(_OPERATIONS, number), await self._read(_RECEIPTS, number)

    async def finish(self) -> None:
        """Let PostgreSQL know what it has now, so that it chooses indexes from the first search on."""
        await self._connection.execute("ANALYZE collections; ANALYZE aliases; ANALYZE documents; ANALYZE receipts")

    async def _send(self, table: _Table, number: int, entries: Iterable[Any]) -> Mark:
        stream = _Stream(table, entries, lead=_packed([struct.pack("!i", number)]))
        await self._connection.copy_to_table(
            table.name, source=_in_turn(stream), columns=("collection", *table.columns), format="binary"
        )
        return stream.mark()

    async def _read(self, table: _Table, number: int) -> Mark:
        digest = _new_digest()

        async def take(piece: bytes) -> None:
            digest.update(piece)

        sql = (
            f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE collection = {number:d} ORDER BY {table.order}"
        )
        status = await self._connection.copy_from_query(sql, output=take, format="binary")
        return Mark(int(status.rpartition(" ")[2]), digest.hexdigest())


def marks_of(operations: Iterable[StoredOperation], receipts: Iterable[StoredReceipt]) -> Marks:
    """Return what `Loading.fill` would have sent of them."""
    return _Stream(_OPERATIONS, operations).read(), _Stream(_RECEIPTS, receipts).read()


@asynccontextmanager
async def loading(url: str) -> AsyncIterator[Loading]:
    """
    Yield the ledger at *url* to be filled, its tables made where there are none; all is committed at the end, or nothing.

    Services that start on it wait until then, and those that run change no name.

    Raises:
        InvalidInput: The schema's name cannot be used.
        NotReady: A newer Tercet wrote it.
        Conflict: Another one fills it, or changes it for long.
        Unavailable: The database cannot be reached, lets this user not in, or fails meanwhile.
    """
    address = Address.parse(url)
    connection = None
    ending = False
    try:
        connection = await connect(address)
        durable = await insist_on_durability(connection)
        async with connection.transaction():
            await connection.execute(_SESSION)
            await connection.fetchval(LOCK, address.schema)
            await migrate(connection, address.schema)
            yield Loading(connection, address, durable=durable)
            ending = True
        await connection.close()
    except asyncpg.LockNotAvailableError as error:
        raise Conflict(
            f"The ledger {address.place} is being filled or changed by another process: wait for it"
        ) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, ValueError) as error:
        raise explain(error, address.place, writing=ending) from error
    finally:
        if connection is not None and not connection.is_closed():
            connection.terminate()


def _packed(fields: Sequence[Field]) -> bytes:
    return b"".join(_NULL if value is None else struct.pack("!i", len(value)) + value for value in fields)


class _Stream:
    """Rows in the binary format of COPY, in pieces; a *lead* is the packed field that comes before those of each row."""

    def __init__(self, table: _Table, entries: Iterable[Any], *, lead: bytes = b"") -> None:
        self._table = table
        self._entries = entries
        self._lead = lead
        self._rows = 0
        self._digest = _new_digest()

    def __iter__(self) -> Iterator[bytes]:
        columns = len(self._table.columns)
        marked, sent = struct.pack("!h", columns), struct.pack("!h", columns + bool(self._lead)) + self._lead
        pending, size = [_HEADER], 0
        self._digest.update(_HEADER)
        for entry in self._entries:
            packed = _packed(self._table.fields(entry))
            self._rows += 1
            self._digest.update(marked)
            self._digest.update(packed)
            pending += (sent, packed)
            size += len(sent) + len(packed)
            if size >= PIECE_BYTES:
                yield b"".join(pending)
                pending, size = [], 0
        self._digest.update(_TRAILER)
        yield b"".join([*pending, _TRAILER])

    def mark(self) -> Mark:
        """Return what was read of it."""
        return Mark(self._rows, self._digest.hexdigest())

    def read(self) -> Mark:
        """Read all of it for its mark."""
        for _ in self:
            pass
        return self.mark()


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


async def _in_turn(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
