"""Connections to the shared ledger's database: where it is, a bounded pool, and which stretch of history they lead to."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from services.common.breaker import Breaker, NotAFailure
from services.common.errors import InvalidInput, TercetError, Unavailable
from services.search.ledger.postgres.epochs import Epoch, present_epoch
from services.search.ledger.postgres.failures import RETRY_AFTER_S, explain

DEFAULT_SCHEMA = "tercet"
CONNECT_TIMEOUT_S = 5.0
ACQUIRE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
STATEMENT_TIMEOUT_S = 30.0
IDLE_LIFETIME_S = 300.0
GLANCE_TIMEOUT_S = 2.0

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,47}")
_SESSION = {
    "application_name": "tercet",
    "jit": "off",
    "lock_timeout": "10s",
    "statement_timeout": f"{STATEMENT_TIMEOUT_S:.0f}s",
    # The server ends a transaction whose process hangs or is out of reach, so that its locks do not stop the others.
    "idle_in_transaction_session_timeout": "30s",
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a shared ledger is: the database's URL, the schema in it, and both in words without the password."""

    dsn: str
    schema: str
    place: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """
        Read `postgresql://user:password@host[,host2]:port/database[?schema=tercet][&…]`; the rest is libpq's.

        Raises:
            InvalidInput: The schema's name is not of a to z, digits and `_`, up to 48 characters.
        """
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        schema = query.pop("schema", DEFAULT_SCHEMA)
        if not _SCHEMA.fullmatch(schema):
            raise InvalidInput(f"The ledger's schema {schema!r} must be of a to z, digits and _, up to 48 characters")
        query.setdefault("target_session_attrs", "primary")
        dsn = urlunsplit(parts._replace(query=urlencode(query)))
        host = parts.netloc.rpartition("@")[2] or query.get("host", "")
        return cls(dsn, schema, f"{host}{parts.path} (schema {schema})")


async def connect(address: Address, *, command_timeout_s: float | None = None) -> asyncpg.Connection:
    """Open one connection, outside of any pool. Raises what asyncpg raises."""
    return await asyncpg.connect(
        address.dsn, timeout=CONNECT_TIMEOUT_S, command_timeout=command_timeout_s, server_settings=_settings(address)
    )


async def insist_on_durability(connection: asyncpg.Connection) -> bool:
    """
    Let commits on *connection* be synced before they are acknowledged, whatever the server's default.

    Returns False where the server is set never to sync its files, which nobody but its operator can change.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    return bool(await connection.fetchval("SELECT current_setting('fsync') = 'on'"))


class Connections:
    """
    A pool of at most *size* connections, each of which knows the epoch of the server that it leads to.

    Once a connection finds another epoch, the older ones are used no more: nothing that is read mixes two histories.
    """

    def __init__(
        self, address: Address, epoch: Epoch, on_epoch: Callable[[], None], *, size: int, breaker: Breaker | None = None
    ) -> None:
        """
        Prepare a pool that begins in *epoch*; `open` it. *on_epoch* is called whenever the epoch has changed.

        *breaker* is that of `glance`.
        """
        self._address = address
        self._breaker = breaker or Breaker("ledger")
        self._epoch = epoch
        self._on_epoch = on_epoch
        self._epochs: dict[int, Epoch] = {}
        self._pool = asyncpg.create_pool(
            address.dsn,
            min_size=0,
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=STATEMENT_TIMEOUT_S,
            max_inactive_connection_lifetime=IDLE_LIFETIME_S,
            server_settings=_settings(address),
            init=self._begin,
            reset=_leave_as_it_is,
        )

    async def open(self) -> None:
        """Make the pool usable; its connections are made when they are needed."""
        await self._pool

    @property
    def epoch(self) -> Epoch:
        """The epoch that the newest connection found."""
        return self._epoch

    @asynccontextmanager
    async def session(self, *, writing: bool = False) -> AsyncIterator[asyncpg.Connection]:
        """
        Lend a connection, in a transaction where *writing*; it is committed at the end, or rolled back after an error.

        Raises:
            Unavailable: The database cannot be reached, is busy, or changed its epoch meanwhile.
        """
        try:
            async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
                self._check(connection)
                if writing:
                    async with connection.transaction():
                        yield connection
                else:
                    yield connection
                self._check(connection)
        except TercetError:
            raise
        except asyncpg.ReadOnlySQLTransactionError as error:
            await self._pool.expire_connections()  # the next ones may lead to the server that took over
            raise explain(error, self._address.place, writing=False) from error
        except Exception as error:
            raise explain(error, self._address.place, writing=writing) from error

    @asynccontextmanager
    async def glance(self) -> AsyncIterator[asyncpg.Connection]:
        """
        Lend a connection for one of the short reads that searches wait for, behind the breaker.

        Writers and followers have time, and are not kept from trying: they do not come this way.

        Raises:
            Unavailable: As `session`; the read took over two seconds; the breaker is open.
        """
        try:
            async with self._breaker.guard():
                try:
                    async with asyncio.timeout(GLANCE_TIMEOUT_S), self.session() as connection:
                        try:
                            yield connection
                        except asyncio.CancelledError:
                            connection.terminate()  # a server that does not answer would hold up its return to the pool
                            raise
                except TimeoutError as error:
                    raise explain(error, self._address.place, writing=False) from error
                except Unavailable:
                    raise
                except TercetError as error:  # the question was wrong, and the database well
                    raise NotAFailure from error
        except NotAFailure as error:
            raise error.__cause__ or error from None

    async def aclose(self) -> None:
        """Close all connections, without ceremony where the server does not answer; those in use are given back before."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._pool.terminate()

    async def adopt(self, connection: asyncpg.Connection) -> None:
        """Take the epoch that a new *connection* leads to as the present one."""
        epoch = await present_epoch(connection, self._address.schema)
        if epoch != self._epoch:
            self._epoch = epoch
            self._on_epoch()
            await self._pool.expire_connections()
        pid = connection.get_server_pid()
        self._epochs[pid] = epoch

        def forget(_connection: object) -> None:
            if self._epochs.get(pid) is epoch:  # the number may be another process's by now
                del self._epochs[pid]

        connection.add_termination_listener(forget)

    async def _begin(self, connection: asyncpg.Connection) -> None:
        await insist_on_durability(connection)
        await self.adopt(connection)

    def _check(self, connection: asyncpg.Connection) -> None:
        if self._epochs.get(connection.get_server_pid()) != self._epoch:
            raise Unavailable(
                f"The ledger {self._address.place} was restarted, restored or failed over just now",
                retry_after_s=RETRY_AFTER_S,
            )


def _settings(address: Address) -> dict[str, str]:
    return {**_SESSION, "search_path": address.schema}


async def _leave_as_it_is(connection: asyncpg.Connection) -> None:
    """Spare a round trip: no call leaves anything in a session, and asyncpg itself ends an open transaction."""
