"""The shared key-value store (Redis) as every service uses it: behind a breaker, quick to give up, its loss no error."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from redis import asyncio as redis_asyncio
from redis.exceptions import RedisError, ResponseError

from services.common.breaker import Breaker
from services.common.errors import DependencyUnavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

TIMEOUT_S = 0.25


class KeyValueStore:
    """A Redis at *url*. Close it with `aclose`."""

    def __init__(self, url: str, breaker: Breaker, *, timeout_s: float = TIMEOUT_S, max_connections: int = 64) -> None:
        self._redis = redis_asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, max_connections=max_connections
        )
        self._breaker = breaker
        self._answers = True

    @property
    def available(self) -> bool:
        """Whether it answered when it was last asked."""
        return self._answers

    async def attempt(self, operation: Callable[["redis_asyncio.Redis"], Awaitable[T]]) -> T | None:
        """
        Return what *operation* returns, or None when the store fails, is late, or its breaker is open.

        A key that holds another type is somebody else's: None too, and the store counts as well.
        """
        try:
            async with self._breaker.guard():
                found = await self._run(operation)
        except (RedisError, OSError, DependencyUnavailable) as error:
            if self._answers:
                log.warning("key_value_store_fails", error=type(error).__name__)
            self._answers = False
            return None
        self._answers = True
        return found

    async def _run(self, operation: Callable[["redis_asyncio.Redis"], Awaitable[T]]) -> T | None:
        try:
            return await operation(self._redis)
        except ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                return None
            raise

    async def aclose(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
