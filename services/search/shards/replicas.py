"""The hosts that have the same shards: which of them to ask first, and what each was last known to be worth."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from services.search.ports import ShardHost

FIRST_ASIDE_S = 0.2
LAST_ASIDE_S = 5.0
BEHIND_S = 1.0  # a replica that was behind is asked again after so long

Key = tuple[str, int]  # a collection's uuid and a shard's number


@dataclass(slots=True, eq=False)
class _Health:
    """How many calls in a row have failed, and until when no more are made if there is another to ask."""

    failures: int = 0
    aside_until: float = 0.0

    def failed(self) -> None:
        self.aside_until = _now() + min(LAST_ASIDE_S, FIRST_ASIDE_S * 2.0 ** min(self.failures, 20))
        self.failures += 1

    def trying(self) -> None:
        """Keep others away for as long as the call takes that tries whether it is well again."""
        if self.failures:
            self.aside_until = max(self.aside_until, _now() + LAST_ASIDE_S)


@dataclass(slots=True, eq=False)
class Replica:
    """
    A host, its health and its load, as this process knows them.

    *local* hosts are in this process. What fails is put aside, twice as long each time; then one call tries it: the
    whole host where it did not answer, and one shard of it where that could not.
    """

    host: ShardHost
    local: bool = False
    in_flight: int = 0
    applied: dict[Key, int] = field(default_factory=dict)
    _health: _Health = field(default_factory=_Health)
    _failing: dict[Key, _Health] = field(default_factory=dict)
    _behind_until: dict[Key, float] = field(default_factory=dict)

    def aside_until(self, key: Key) -> float:
        """When the host may be asked for a shard again; in the past where it may be asked now."""
        failing = self._failing.get(key)
        return self._health.aside_until if failing is None else max(self._health.aside_until, failing.aside_until)

    def behind(self, key: Key) -> bool:
        """Whether a shard on this host was lately seen to be behind."""
        return key in self._behind_until and self._behind_until[key] > _now()

    @contextmanager
    def calling(self, key: Key) -> Iterator[None]:
        """Count a call as in flight, and learn from its end unless it raises: see `failed` for that."""
        self.in_flight += 1
        self._health.trying()
        failing = self._failing.get(key)
        if failing is not None:
            failing.trying()
        try:
            yield
            if self._health.failures or failing is not None:
                self.answered(key)
        finally:
            self.in_flight -= 1

    def failed(self, key: Key, *, whole: bool) -> None:
        """Note that a call failed: *whole* says that the host did not answer at all."""
        if whole:
            self._health.failed()
        else:
            self._failing.setdefault(key, _Health()).failed()

    def answered(self, key: Key) -> None:
        """Note that a call was answered."""
        self._health = _Health()
        self._failing.pop(key, None)

    def stands_at(self, key: Key, seq: int, *, behind: bool) -> None:
        """Note how far a shard is on this host, and whether it should be further."""
        self.applied[key] = seq
        if behind:
            self._behind_until[key] = _now() + BEHIND_S
        else:
            self._behind_until.pop(key, None)

    def forget(self, uuid: str) -> None:
        """Drop what is known of a collection."""
        for key in [key for key in {*self.applied, *self._failing, *self._behind_until} if key[0] == uuid]:
            self.applied.pop(key, None)
            self._failing.pop(key, None)
            self._behind_until.pop(key, None)


def in_order(replicas: Sequence[Replica], key: Key, fallback: Replica | None) -> list[Replica]:
    """
    Return whom to ask for a shard, one after the other.

    Those that are well and caught up come first, the least loaded of them before the others; then those that are
    behind; then the fallback index; and those put aside last, as they may be back.
    """
    if len(replicas) == 1 and fallback is None:
        return list(replicas)
    now = _now()
    well = [replica for replica in replicas if replica.aside_until(key) <= now]
    well.sort(key=lambda replica: (replica.behind(key), replica.in_flight, random.random()))
    aside = [replica for replica in replicas if replica.aside_until(key) > now]
    aside.sort(key=lambda replica: replica.aside_until(key))
    return [*well, *([fallback] if fallback is not None else ()), *aside]


class Placement(Protocol):
    """Which hosts have which shards. The router asks anew for each call, as names may come to mean other addresses."""

    @property
    def fallback(self) -> Replica | None:
        """The fallback index, which has all shards of all collections, if there is one."""
        ...

    def replicas(self, shard: int) -> Sequence[Replica]:
        """Return the hosts that have the shards of that number, at least one."""
        ...

    def everyone(self) -> Sequence[Replica]:
        """Return all hosts, the fallback index last."""
        ...


@dataclass(frozen=True, slots=True)
class OneHost:
    """The placement of an embedded service: all shards are on one host."""

    replica: Replica
    fallback: Replica | None = None

    def replicas(self, shard: int) -> Sequence[Replica]:
        """See Placement."""
        return (self.replica,)

    def everyone(self) -> Sequence[Replica]:
        """See Placement."""
        return (self.replica,) if self.fallback is None else (self.replica, self.fallback)


def _now() -> float:
    return asyncio.get_running_loop().time()
