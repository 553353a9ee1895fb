"""
How much each caller may ask for: token buckets on requests and on model tokens.

A bucket holds up to its burst and fills at its rate. A request takes one from the first before the work; the tokens that
it cost are taken from the second afterwards, which may leave a debt: until that is paid off, requests are refused.
The buckets are in Redis, by its clock, where there is one, so that all processes of a service share them; else, and
while Redis is lost, in this process.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import NoScriptError

from services.common.errors import RateLimited
from services.common.key_value import KeyValueStore

MAX_CALLERS = 10_000  # Remembered in this process; the one not seen for longest is forgotten, its buckets full again.
MAX_AT_ONCE = 12  # Fewer than the store has connections: having none to spare would look as if it were lost.
KEY_PREFIX = "tercet:limits"

# Arguments: rate and burst of the requests, rate and burst of the tokens, requests to take, tokens to charge.
# The reply: milliseconds until the request would be admitted; 0 says that it was.
SCRIPT = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local state = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local elapsed = state[3] and math.max(0, now - tonumber(state[3])) or 0
local function level(kept, rate, burst)
  return kept and math.min(burst, tonumber(kept) + elapsed * rate) or burst
end
local requests_rate, requests_burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local tokens_rate, tokens_burst = tonumber(ARGV[3]), tonumber(ARGV[4])
local take, charge = tonumber(ARGV[5]), tonumber(ARGV[6])
local requests = level(state[1], requests_rate, requests_burst)
local tokens = level(state[2], tokens_rate, tokens_burst)
local wait = 0
if take > 0 and requests_rate > 0 and requests < take then wait = (take - requests) / requests_rate end
if take > 0 and tokens_rate > 0 and tokens < 0 then wait = math.max(wait, -tokens / tokens_rate) end
if wait == 0 then requests = requests - take end
tokens = tokens - charge
local full = 1
if requests_rate > 0 then full = math.max(full, (requests_burst - requests) / requests_rate) end
if tokens_rate > 0 then full = math.max(full, (tokens_burst - tokens) / tokens_rate) end
redis.call('HSET', KEYS[1], 'requests', requests, 'tokens', tokens, 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(full * 1000))
return math.ceil(wait * 1000)
"""
_SCRIPT_DIGEST = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller is allowed; a rate of 0 is no limit."""

    requests_per_s: float = 0.0
    requests_burst: int = 50
    tokens_per_s: float = 0.0
    tokens_burst: int = 100_000

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self.requests_per_s > 0 or self.tokens_per_s > 0


class _Buckets:
    """One caller's two buckets in this process."""

    __slots__ = ("at", "requests", "tokens")

    def __init__(self, limits: Limits, now: float) -> None:
        self.requests = float(limits.requests_burst)
        self.tokens = float(limits.tokens_burst)
        self.at = now

    def use(self, limits: Limits, now: float, *, take: int, charge: int) -> float:
        """Take and charge as SCRIPT does; return the seconds to wait."""
        elapsed = max(0.0, now - self.at)
        self.at = now
        self.requests = min(limits.requests_burst, self.requests + elapsed * limits.requests_per_s)
        self.tokens = min(limits.tokens_burst, self.tokens + elapsed * limits.tokens_per_s)
        wait_s = 0.0
        if take and limits.requests_per_s > 0 and self.requests < take:
            wait_s = (take - self.requests) / limits.requests_per_s
        if take and limits.tokens_per_s > 0 and self.tokens < 0:
            wait_s = max(wait_s, -self.tokens / limits.tokens_per_s)
        if wait_s == 0:
            self.requests -= take
        self.tokens -= charge
        return wait_s


class Governor:
    """The buckets of all callers of *service*. Used from one event loop; close it with `aclose`."""

    def __init__(
        self,
        service: str,
        store: KeyValueStore | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_callers: int = MAX_CALLERS,
    ) -> None:
        self._service = service
        self._store = store
        self._clock = clock
        self._max_callers = max_callers
        self._local: OrderedDict[str, _Buckets] = OrderedDict()
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._charges: set[asyncio.Task[None]] = set()

    async def admit(self, caller: str, limits: Limits) -> None:
        """
        Take one request from *caller*'s bucket.

        Raises:
            RateLimited: There is none left, or the tokens are in debt; `retry_after_s` says until when.
        """
        wait_s = await self._use(caller, limits, take=1, charge=0)
        if wait_s > 0:
            raise RateLimited(
                f"Too many requests or tokens: come again in {wait_s:.3g} s. {_spoken(limits)}", retry_after_s=wait_s
            )

    def charge(self, caller: str, limits: Limits, tokens: int) -> None:
        """Take *tokens* from *caller*'s bucket, into debt if need be; where that is in Redis, soon. Never raises."""
        if tokens <= 0 or limits.tokens_per_s <= 0:
            return
        if self._store is None:
            self._use_local(caller, limits, take=0, charge=tokens)
            return
        task = asyncio.get_running_loop().create_task(self._charge_shared(caller, limits, tokens))
        self._charges.add(task)
        task.add_done_callback(self._charges.discard)

    async def aclose(self) -> None:
        """Write what is still to be charged, and close the connections."""
        await asyncio.gather(*self._charges)
        if self._store is not None:
            await self._store.aclose()

    async def _charge_shared(self, caller: str, limits: Limits, tokens: int) -> None:
        await self._use(caller, limits, take=0, charge=tokens)

    async def _use(self, caller: str, limits: Limits, *, take: int, charge: int) -> float:
        if self._store is not None:
            key = f"{KEY_PREFIX}:{self._service}:{caller}"
            allowed = (limits.requests_per_s, limits.requests_burst, limits.tokens_per_s, limits.tokens_burst)
            async with self._turns:
                wait_ms = await self._store.attempt(lambda redis: _run_script(redis, key, (*allowed, take, charge)))
            if wait_ms is not None:
                return wait_ms / 1000
        return self._use_local(caller, limits, take=take, charge=charge)

    def _use_local(self, caller: str, limits: Limits, *, take: int, charge: int) -> float:
        now = self._clock()
        buckets = self._local.get(caller)
        if buckets is None:
            buckets = self._local[caller] = _Buckets(limits, now)
            if len(self._local) > self._max_callers:
                self._local.popitem(last=False)
        else:
            self._local.move_to_end(caller)
        return buckets.use(limits, now, take=take, charge=charge)


async def _run_script(redis: Any, key: str, arguments: tuple[float, ...]) -> int:
    try:
        return int(await redis.evalsha(_SCRIPT_DIGEST, 1, key, *arguments))
    except NoScriptError:
        return int(await redis.eval(SCRIPT, 1, key, *arguments))


def _spoken(limits: Limits) -> str:
    parts = []
    if limits.requests_per_s > 0:
        parts.append(f"{limits.requests_per_s:g} requests/s with bursts of {limits.requests_burst:,}")
    if limits.tokens_per_s > 0:
        parts.append(f"{limits.tokens_per_s:g} tokens/s with bursts of {limits.tokens_burst:,}")
    return f"Allowed: {' and '.join(parts)}"
