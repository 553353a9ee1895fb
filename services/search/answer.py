"""An answer to a search, as a value and as the bytes that travel: one that was kept is passed on without being read."""

from collections.abc import Mapping, Sequence

import orjson

from services.common.wire.search import CacheReply, Degradation, SearchReply

# What one caller's copy of an answer says by itself; all else is the same for all, and what is kept.
_OWN = {"degraded", "cache", "timings_ms", "request_id"}


class Answer:
    """
    One search's reply. *reply* makes it of what the pipeline composed, `kept` of what the cache holds.

    An answer never changes: `addressed` and `flagged` return others that share its contents.
    """

    __slots__ = ("_contents", "_timings_ms", "cache", "degraded", "request_id")

    def __init__(self, reply: SearchReply) -> None:
        self._contents = _Contents(reply, None)
        self.cache = reply.cache
        self.degraded: Sequence[Degradation] = reply.degraded
        self.request_id = reply.request_id
        self._timings_ms: Mapping[str, float] = reply.timings_ms

    @classmethod
    def kept(cls, head: bytes, cache: CacheReply, degraded: Sequence[Degradation] = ()) -> "Answer":
        """Return the answer whose `head` was kept, with what is to be said of it now."""
        return cls._of(_Contents(None, head), cache, degraded, {}, None)

    @classmethod
    def _of(
        cls,
        contents: "_Contents",
        cache: CacheReply,
        degraded: Sequence[Degradation],
        timings_ms: Mapping[str, float],
        request_id: str | None,
    ) -> "Answer":
        made = cls.__new__(cls)
        made._contents = contents
        made.cache = cache
        made.degraded = degraded
        made.request_id = request_id
        made._timings_ms = timings_ms
        return made

    @property
    def head(self) -> bytes:
        """The JSON of all that is the same for every caller, without the brace that would end it; made once."""
        return self._contents.head()

    def addressed(self, request_id: str | None, timings_ms: Mapping[str, float]) -> "Answer":
        """Return the same answer for one caller, with the times that it took for that one."""
        return self._of(self._contents, self.cache, self.degraded, timings_ms, request_id)

    def flagged(self, degraded: Sequence[Degradation]) -> "Answer":
        """Return the same answer with the steps down *degraded* besides its own."""
        more = [reason for reason in degraded if reason not in self.degraded]
        if not more:
            return self
        return self._of(self._contents, self.cache, [*self.degraded, *more], self._timings_ms, self.request_id)

    def reply(self) -> SearchReply:
        """Return it as a value; a kept one is parsed here, and only here."""
        contents = self._contents
        if contents.reply is None:
            contents.reply = SearchReply.model_validate_json(self.body())
        own = {
            "degraded": list(self.degraded),
            "cache": self.cache,
            "timings_ms": dict(self._timings_ms),
            "request_id": self.request_id,
        }
        return contents.reply.model_copy(update=own)

    def body(self) -> bytes:
        """Return it as JSON, without what is None."""
        cache: dict[str, bool | int] = {"hit": self.cache.hit, "stale": self.cache.stale}
        if self.cache.age_ms is not None:
            cache["age_ms"] = self.cache.age_ms
        own = {"degraded": self.degraded, "cache": cache, "timings_ms": self._timings_ms}
        if self.request_id is not None:
            own["request_id"] = self.request_id
        return b"%b,%b" % (self.head, orjson.dumps(own)[1:])


class _Contents:
    """What answers share: the reply, its JSON, or both once both were wanted."""

    __slots__ = ("_head", "reply")

    def __init__(self, reply: SearchReply | None, head: bytes | None) -> None:
        self.reply = reply
        self._head = head

    def head(self) -> bytes:
        if self._head is None:
            assert self.reply is not None, "contents are made of the one or the other"
            self._head = self.reply.model_dump_json(exclude=_OWN, exclude_none=True).encode()[:-1]
        return self._head
