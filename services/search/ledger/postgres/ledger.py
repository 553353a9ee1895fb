"""The shared ledger: the `Ledger` port over PostgreSQL."""

import asyncio
import uuid as uuids
from collections.abc import AsyncIterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import asyncpg
import structlog

from services.common.breaker import Breaker
from services.common.errors import NotFound, NotReady
from services.common.tracing import span
from services.search.ledger.clearing import Clearing
from services.search.ledger.postgres import epochs, names, rows
from services.search.ledger.postgres.connections import Address, Connections, connect, insist_on_durability
from services.search.ledger.postgres.failures import explain
from services.search.ledger.postgres.news import Heard, News
from services.search.ledger.postgres.schema import migrate
from services.search.ports import (
    Collection,
    CollectionState,
    KnownDocument,
    LedgerDocument,
    Operation,
    Receipt,
    Written,
)

POOL_SIZE = 8

_log = structlog.get_logger(__name__)


class PostgresLedger:
    """
    The `Ledger` port over one schema of a PostgreSQL database (14 or newer), for any number of processes.

    A write returns once PostgreSQL has synced its commit. Where the connection is lost during a commit, the write raises
    Unavailable and may have happened: repeating it is safe, since an upsert or a deletion done twice is the same, and a
    receipt tells. Cancelling a write leaves it whole or absent. A restart of the server costs the calls under way an
    Unavailable; later calls connect again by themselves.

    An epoch is the life of one server process over one database's tables: each new connection compares the server's
    start time, the database and the files of the tables with the newest epoch's, and notes where every collection stands
    when they differ. Nothing else needs to be noted: whoever restores a data directory, a base backup to any point in
    time, or a dump, or promotes a standby, starts another server, makes another database or other tables. Starts of
    our own processes begin no epoch. What cannot be noticed is rows changed by hand, or restored into the present tables
    row by row, while the server runs.
    """

    def __init__(self, address: Address, connections: Connections, news: News, heard: Heard, origin: str) -> None:
        """Serve through *connections*; `open` is the way to make one."""
        self._address = address
        self._connections = connections
        self._news = news
        self._origin = origin
        self._heard = heard
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing: asyncio.Task[None] | None = None
        self._clearing = Clearing(address.place, self._clear_part)

    @classmethod
    async def open(cls, url: str, *, pool_size: int = POOL_SIZE, breaker: Breaker | None = None) -> "PostgresLedger":
        """
        Open the ledger at *url* (see Address.parse), making its schema and tables where there are none.

        Up to *pool_size* connections are used at a time, and one more to listen. *breaker* guards the reads that searches
        wait for: names, watermarks, history.

        Raises:
            InvalidInput: The schema's name cannot be used.
            NotReady: A newer Tercet wrote it.
            Unavailable: The database cannot be reached, or lets this user not in or not create the tables.
        """
        address = Address.parse(url)
        connection = None
        try:
            connection = await connect(address)
            await migrate(connection, address.schema)
            if not await insist_on_durability(connection):
                _log.warning("ledger_not_durable", ledger=address.place, reason="PostgreSQL runs with fsync=off")
            ledger = await cls._start(address, connection, pool_size, breaker)
        except BaseException as error:
            if connection is not None:
                connection.terminate()
            if isinstance(error, Exception):
                raise explain(error, address.place, writing=False) from error
            raise
        ledger._clearing.ask()
        return ledger

    @classmethod
    async def _start(
        cls, address: Address, connection: asyncpg.Connection, pool_size: int, breaker: Breaker | None
    ) -> "PostgresLedger":
        origin = uuids.uuid4().hex
        epoch = await epochs.present_epoch(connection, address.schema)

        heard = Heard()
        connections = Connections(address, epoch, heard.forget_all, size=pool_size, breaker=breaker)

        async def listener() -> asyncpg.Connection:
            again = await connect(address)
            await connections.adopt(again)
            return again

        news = News(listener, _channel(address), origin, heard)
        await connections.open()
        await news.start(connection)
        return cls(address, connections, news, heard, origin)

    @property
    def epoch(self) -> str:
        """The token of the epoch that the newest connection found; it may change with any call, before that returns."""
        return self._connections.epoch.token

    @property
    def exclusive(self) -> bool:
        """False: other processes write too."""
        return False

    async def shares_history(self, uuid: str, epoch: str, seq: int) -> bool:
        """Whether operations up to *seq* of a collection, read in *epoch*, are this ledger's too."""
        async with self._glance("shares_history") as connection:
            return await epochs.shares_history(connection, uuid, epoch, seq)

    # --- collections and aliases

    async def create_collection(self, collection: Collection) -> None:
        """Add *collection*. Raises Conflict when the name is taken, by a collection or by an alias."""
        async with self._session("create", writing=True) as connection:
            await names.create(connection, self._address.schema, collection)

    async def list_collections(self) -> list[Collection]:
        """Return all collections, by name."""
        async with self._glance("collections") as connection:
            return await names.collections(connection)

    async def find_collection(self, name: str) -> Collection | None:
        """Return the collection of that name, or the one that the alias of that name means, if there is one."""
        async with self._glance("collections") as connection:
            return await names.find(connection, name)

    async def delete_collection(self, uuid: str) -> bool:
        """Remove a collection with its aliases and documents at once; their space is freed in the background."""
        async with self._session("drop", writing=True) as connection:
            dropped = await names.drop(connection, self._address.schema, uuid)
        self._heard.forget(uuid)
        if dropped:
            self._clearing.ask()
        return dropped

    async def list_aliases(self) -> dict[str, str]:
        """Return all aliases, by name, each with the name of its collection."""
        async with self._session("aliases") as connection:
            return await names.aliases(connection)

    async def set_aliases(self, changes: Mapping[str, str | None]) -> None:
        """Let each alias mean the collection named, or nothing; all or none. Raises NotFound or Conflict."""
        async with self._session("set_aliases", writing=True) as connection:
            await names.set_aliases(connection, self._address.schema, changes)

    # --- documents and operations

    async def append(
        self,
        uuid: str,
        upserts: Sequence[LedgerDocument],
        *,
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        """Store *upserts* in one transaction, an operation each, in order. Raises NotFound, InvalidInput or Conflict."""
        async with self._change("append", uuid) as change:
            written = await change.append(upserts, expected or {}, receipt)
        self._heard.hear(uuid, written.seq)
        return written

    async def delete(
        self,
        uuid: str,
        ids: Sequence[str],
        *,
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        """Delete the documents of *ids* that exist. Raises NotFound or Conflict."""
        async with self._change("delete", uuid) as change:
            written = await change.delete(ids, expected or {}, receipt)
        self._heard.hear(uuid, written.seq)
        return written

    async def find_receipt(self, uuid: str, key: str) -> Receipt | None:
        """Return what was kept under an idempotency key, for at least a day after its write."""
        async with self._session("find_receipt") as connection:
            return await rows.find_receipt(connection, uuid, key)

    async def known(self, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
        """Return what is held for those of *ids* that are live."""
        async with self._session("known") as connection:
            return await rows.known(connection, uuid, ids)

    async def documents(self, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
        """Return the live documents among *ids*."""
        async with self._session("documents") as connection:
            return await rows.documents(connection, uuid, ids)

    async def operations_after(self, uuid: str, seq: int, *, limit: int) -> list[Operation]:
        """Return up to *limit* operations numbered above *seq*, in order; none for a collection that is gone."""
        async with self._session("operations_after") as connection:
            operations = await rows.operations_after(connection, uuid, seq, limit)
        if operations:
            self._heard.hear(uuid, operations[-1].seq)
        return operations

    async def state(self, uuid: str) -> CollectionState:
        """Return where the collection stands. Raises NotFound."""
        async with self._glance("state") as connection:
            state = await rows.state(connection, uuid)
        self._heard.hear(uuid, state.seq)
        return state

    def heard_seq(self, uuid: str) -> int:
        """Return the last operation number that was read, written or announced in this epoch; 0 if none was."""
        return self._heard.seq(uuid)

    def heard_collections(self) -> AbstractSet[str]:
        """Return the uuids of the collections of which something was read, written or announced in this epoch."""
        return self._heard.collections()

    async def wait_for_news(self, timeout_s: float) -> None:
        """Return when another process has announced a change since the last call, or *timeout_s* is over."""
        self._check_open()
        await self._news.wait(timeout_s)

    async def trim(self, uuid: str, seq: int) -> int:
        """Forget deletions numbered up to *seq*, and receipts older than a day; return how many deletions."""
        try:
            async with self._change("trim", uuid) as change:
                return await change.trim(seq)
        except NotFound:
            return 0

    # --- the end, and what all calls share

    async def aclose(self) -> None:
        """Close all connections; calls under way finish first, later ones raise NotReady. Twice does no harm."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._clearing.aclose()
        await self._idle.wait()
        await self._news.aclose()
        await self._connections.aclose()

    @asynccontextmanager
    async def _session(self, operation: str, *, writing: bool = False) -> AsyncIterator[asyncpg.Connection]:
        async with self._call(operation), self._connections.session(writing=writing) as connection:
            yield connection

    @asynccontextmanager
    async def _glance(self, operation: str) -> AsyncIterator[asyncpg.Connection]:
        async with self._call(operation), self._connections.glance() as connection:
            yield connection

    @asynccontextmanager
    async def _change(self, operation: str, uuid: str) -> AsyncIterator[rows.Change]:
        # Writers of one collection take turns here rather than at its row, where each would occupy a connection.
        turn = self._turns.setdefault(uuid, asyncio.Lock())
        async with self._call(operation), turn, self._connections.session(writing=True) as connection:
            change = rows.Change(connection, _channel(self._address), self._origin)
            await change.begin(uuid)
            yield change

    @asynccontextmanager
    async def _call(self, operation: str) -> AsyncIterator[None]:
        self._check_open()
        self._calls += 1
        self._idle.clear()
        try:
            with span(f"ledger.{operation}"):
                yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise NotReady(f"The ledger {self._address.place} is closed: the service is shutting down")

    async def _clear_part(self) -> bool:
        async with self._session("clear", writing=True) as connection:
            return await rows.clear(connection)


def _channel(address: Address) -> str:
    return f"tercet_{address.schema}"
