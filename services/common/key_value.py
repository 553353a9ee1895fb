"""The shared key-value store (Redis) as every service uses it: behind a breaker, quick to give up, its loss no error."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from services.common.breaker import Breaker, NotAFailure
from services.common.errors import DependencyUnavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

TIMEOUT_S = 0.05
MAX_CONNECTIONS = 16  # More would serve no more: opening them all at once is what takes long.
# Of the event loop, after the time is up: an answer that has arrived is read though the loop was held up.
LAST_TURNS = 3
COMPLAIN_EVERY_S = 10.0


class _Answered(NotAFailure):
    """The store answered that it will not: it is read-only, or full, or another type is under the key."""

    def __init__(self, error: ResponseError) -> None:
        super().__init__(str(error))
        self.error = error


class KeyValueStore:
    """
    A Redis at *url*. Close it with `aclose`.

    An operation has *timeout_s* in all, once it has one of the *max_connections*, for which it waits as long at most.
    """

    def __init__(
        self, url: str, breaker: Breaker, *, timeout_s: float = TIMEOUT_S, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        # The operation as a whole is timed here: a time-out of the library's own counts an answer that has come as late.
        self._redis = redis_asyncio.Redis.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=None,
            max_connections=max_connections,
            retry=Retry(NoBackoff(), 1),  # At once, for a connection that the store closed while it was idle.
            protocol=2,
            driver_info=None,  # With no name to tell, and protocol 2, a new connection needs no round trips of its own.
        )
        self._breaker = breaker
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(max_connections)
        self._answers = True
        self._quiet_until = 0.0

    @property
    def available(self) -> bool:
        """Whether it answered when it was last asked."""
        return self._answers

    @property
    def breaker(self) -> Breaker:
        """What keeps it from being asked while it does not answer."""
        return self._breaker

    async def attempt(self, operation: Callable[["redis_asyncio.Redis"], Awaitable[T]]) -> T | None:
        """
        Return what *operation* returns, or None when the store fails, is late or refuses, or its breaker is open.

        What the store itself refuses (it is read-only or full, or a key holds another type and is somebody else's) does
        not count against it; nor does a wait for a connection in vain.
        """
        if self._breaker.would_refuse() or not await self._turn():
            return None
        try:
            async with self._breaker.guard():
                found = await self._within(operation)
        except _Answered as refusal:
            self._complain(str(refusal))
            self._answers = True
            return None
        except (RedisError, OSError, RuntimeError, DependencyUnavailable) as error:
            # RuntimeError: what uvloop raises where the connection was reset and the client does not know it yet.
            if self._answers:
                log.warning("key_value_store_fails", error=type(error).__name__)
            self._answers = False
            return None
        finally:
            self._turns.release()
        self._answers = True
        return found

    def _complain(self, refusal: str) -> None:
        now = time.monotonic()
        if not refusal.startswith("WRONGTYPE") and now >= self._quiet_until:
            self._quiet_until = now + COMPLAIN_EVERY_S
            log.warning("key_value_store_refuses", error=refusal[:100])

    async def _turn(self) -> bool:
        if not self._turns.locked():
            return await self._turns.acquire()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._turns.acquire()
        except TimeoutError:
            return False

    async def _within(self, operation: Callable[["redis_asyncio.Redis"], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        over = False

        def expire(turns: int) -> None:
            if turns:
                loop.call_soon(expire, turns - 1)
            elif not over:
                limit.reschedule(loop.time())

        try:
            async with asyncio.timeout(None) as limit:
                last = loop.call_later(self._timeout_s, expire, LAST_TURNS)
                try:
                    return await operation(self._redis)
                finally:
                    over = True
                    last.cancel()
        except ResponseError as error:
            raise _Answered(error) from None

    async def aclose(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
