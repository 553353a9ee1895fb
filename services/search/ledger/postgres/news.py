"""One connection that listens to what other processes announce, and comes back when it is lost."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

import asyncpg
import structlog

PROBE_INTERVAL_S = 15.0
PROBE_TIMEOUT_S = 5.0
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0

_log = structlog.get_logger(__name__)


class Heard:
    """The last operation number of each collection that this process knows of, in the present epoch."""

    def __init__(self) -> None:
        self._seqs: dict[str, int] = {}

    def seq(self, uuid: str) -> int:
        """Return a collection's number; 0 where nothing was heard."""
        return self._seqs.get(uuid, 0)

    def collections(self) -> AbstractSet[str]:
        """Return the uuids of the collections of which something was heard."""
        return self._seqs.keys()

    def hear(self, uuid: str, seq: int) -> None:
        """Take note that a collection has come to *seq*, or beyond."""
        if seq > self.seq(uuid):
            self._seqs[uuid] = seq

    def forget(self, uuid: str) -> None:
        """Take note that a collection is gone."""
        self._seqs.pop(uuid, None)

    def forget_all(self) -> None:
        """Take note that history has changed: numbers of before may never have been."""
        self._seqs.clear()


class News:
    """
    Hears announcements (`uuid:seq:origin`) on a channel; those of *origin* itself are no news.

    While the connection is lost nothing is heard, so its return counts as news: what was missed is then looked for.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[asyncpg.Connection]],
        channel: str,
        origin: str,
        heard: Heard,
    ) -> None:
        """Listen on *channel*, after a loss through what *connect* returns; tell *heard* of it."""
        self._connect = connect
        self._channel = channel
        self._origin = origin
        self._heard = heard
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, connection: asyncpg.Connection) -> None:
        """Listen through *connection*, and through others after it, until `aclose`."""
        await connection.add_listener(self._channel, self._notified)
        self._task = asyncio.create_task(self._run(connection))

    async def wait(self, timeout_s: float) -> None:
        """Return at the next announcement, at once if there was one since the last call, or when *timeout_s* is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()

    async def aclose(self) -> None:
        """Stop listening, and let those who wait go."""
        self._news.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: Any) -> None:
        uuid, seq, origin = str(payload).rsplit(":", 2)
        self._heard.hear(uuid, int(seq))
        if origin != self._origin:
            self._news.set()

    async def _run(self, connection: asyncpg.Connection | None) -> None:
        delay_s = FIRST_DELAY_S
        while True:
            try:
                if connection is None:
                    connection = await self._connect()
                    await connection.add_listener(self._channel, self._notified)
                    _log.info("ledger_listening_again")
                delay_s = FIRST_DELAY_S
                self._news.set()
                await _until_lost(connection)
            except Exception as error:
                _log.warning("ledger_not_listening", error=f"{type(error).__name__}: {error}", retry_after_s=delay_s)
            finally:
                if connection is not None:
                    connection.terminate()
                    connection = None
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)


async def _until_lost(connection: asyncpg.Connection) -> None:
    """Raise once *connection* is lost, also where nobody says so: a quiet connection may lead nowhere."""
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    while not connection.is_closed():
        with suppress(TimeoutError):
            async with asyncio.timeout(PROBE_INTERVAL_S):
                await lost.wait()
                break
        await connection.fetchval("SELECT 1", timeout=PROBE_TIMEOUT_S)
    raise ConnectionError("the listening connection was closed")
