"""
Calls to another Tercet service: a bulkhead, a breaker, the caller's deadline, bounded retries, and typed answers.

Only idempotent calls are retried, once by default, never past the deadline, and only as far as the budget allows.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from services.common import errors
from services.common.breaker import Breaker, NotAFailure, Unproven
from services.common.deadline import Deadline
from services.common.retry_budget import RetryBudget
from services.common.tracing import span
from services.common.transport import FAIR_TIME_S, RawReply, Transport
from services.common.wire.errors import ErrorEnvelope

Reply = TypeVar("Reply", bound=BaseModel)

RETRY_PAUSE_S = 0.05
_CALLERS_FAULT: dict[int, type[errors.TercetError]] = {
    400: errors.InvalidInput,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.TooLarge,
    422: errors.InvalidInput,
    429: errors.Overloaded,
}


class _NotThePeer(NotAFailure):
    """
    An *error* that says nothing against the peer.

    The request is at fault; or the peer's queue is full; or one of its addresses failed, and others have not.
    """

    def __init__(self, error: errors.TercetError) -> None:
        super().__init__(error.message)
        self.error = error


class _Hasty(Unproven):
    """No answer came in a time that was too short for a fair judgement."""


@dataclass(frozen=True, slots=True)
class _Asked(Generic[Reply]):
    """One call, as it is made each time."""

    method: str
    path: str
    reply: type[Reply]
    content: bytes | None
    deadline: Deadline
    answer_by: Deadline | None
    bulk: bool
    idempotent: bool
    work_s: Callable[[Reply], float] | None


class ServiceClient:
    """
    One peer service at *base_url*, which is sent *api_key* if there is one. Close it with `aclose`.

    At most *max_calls* are under way at once. Calls over *slow_s* seconds count against the peer, except bulk work.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        breaker: Breaker,
        *,
        api_key: str | None = None,
        max_calls: int = 64,
        slow_s: float | None = None,
        budget: RetryBudget | None = None,
        retries: int = 1,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self.breaker = breaker
        self._slow_s = slow_s
        self._budget = budget or RetryBudget()
        self._retries = retries
        self._transport = Transport(name, base_url, api_key=api_key, max_calls=max_calls)

    async def call(
        self,
        method: str,
        path: str,
        reply: type[Reply],
        *,
        body: BaseModel | None = None,
        deadline: Deadline,
        answer_by: Deadline | None = None,
        bulk: bool = False,
        idempotent: bool = True,
        work_s: Callable[[Reply], float] | None = None,
    ) -> Reply:
        """
        Send *body* as JSON and return the parsed answer.

        The peer is told to answer by *answer_by*, else by *deadline*. *bulk* work may take long, and leaves slots free
        for what somebody waits for; *work_s* is how much of an answer's time was work that was asked for: not slowness.

        Raises:
            DependencyUnavailable: The peer cannot be reached, fails, or its breaker is open.
            DeadlineExceeded: No answer came in time.
            Overloaded: As many calls as may be are under way, here or there.
            InvalidInput, NotFound, Conflict, TooLarge: The peer's own verdict on the request.
        """
        content = orjson.dumps(body.model_dump(exclude_none=True)) if body is not None else None
        asked = _Asked(method, path, reply, content, deadline, answer_by, bulk, idempotent, work_s)
        attempts_left = self._retries if idempotent else 0
        deadline.check(f"a call to {self.name}")
        self._budget.first()
        async with self._transport.slots.one(deadline, bulk=bulk):
            while True:
                deadline.check(f"a call to {self.name}")
                try:
                    return await self._guarded(asked)
                except errors.DependencyUnavailable:
                    attempts_left -= 1
                    pause_s = RETRY_PAUSE_S * (1 + random.random())
                    hopeless = self.breaker.would_refuse() or deadline.remaining_s() < 2 * pause_s
                    if attempts_left < 0 or hopeless or not self._budget.take():
                        raise
                    if not self._transport.has_another():
                        await asyncio.sleep(pause_s)

    async def _guarded(self, asked: _Asked[Reply]) -> Reply:
        try:
            async with self.breaker.guard(None if asked.bulk else self._slow_s) as permit:
                with span(f"{asked.method} {asked.path}", "client") as sent:
                    sent.set({"http.request.method": asked.method, "url.path": asked.path, "tercet.peer": self.name})
                    parsed = await self._asked_somewhere(asked)
                if asked.work_s is not None:
                    permit.excused_s = asked.work_s(parsed)
                return parsed
        except _NotThePeer as outcome:
            raise outcome.error from None
        except _Hasty as hasty:
            raise errors.DeadlineExceeded(str(hasty)) from None

    async def _asked_somewhere(self, asked: _Asked[Reply]) -> Reply:
        try:
            return await self._asked(asked)
        except (errors.DependencyUnavailable, errors.DeadlineExceeded) as error:
            if self._transport.has_another():
                raise _NotThePeer(error) from None
            raise

    async def _asked(self, asked: _Asked[Reply]) -> Reply:
        given_s = asked.deadline.remaining_s()
        try:
            raw = await self._transport.send(
                asked.method,
                asked.path,
                asked.deadline,
                content=asked.content,
                answer_by=asked.answer_by,
                repeatable=asked.idempotent,
            )
        except errors.DeadlineExceeded as late:
            if given_s < FAIR_TIME_S:
                raise _Hasty(late.message) from None
            raise
        if not 200 <= raw.status < 300:
            raise self._verdict(raw, given_s)
        try:
            return asked.reply.model_validate(orjson.loads(raw.body))
        except (orjson.JSONDecodeError, ValidationError):
            self._transport.distrust(raw)
            raise errors.DependencyUnavailable(f"{self.name} sent an answer that cannot be read") from None

    def _verdict(self, raw: RawReply, given_s: float) -> Exception:
        try:
            body = ErrorEnvelope.model_validate_json(raw.body).error
            message, param = f"{self.name}: {body.message}", body.param
        except ValidationError:
            message, param = f"{self.name}: HTTP {raw.status}", None
        if raw.status == 504:
            return _Hasty(message) if given_s < FAIR_TIME_S else errors.DeadlineExceeded(message)
        kind = _CALLERS_FAULT.get(raw.status)
        if kind is None:
            return errors.DependencyUnavailable(message)
        after = raw.headers.get("retry-after", "")
        return _NotThePeer(kind(message, param=param, retry_after_s=float(after) if after.isdigit() else None))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()
