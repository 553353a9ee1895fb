"""The hosts that have the same shards: which of them to ask first, and what each was last known to be worth."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from services.common.breaker import Breaker
from services.common.quantile import RollingQuantile
from services.search.ports import ShardHost

FIRST_ASIDE_S = 0.2
LAST_ASIDE_S = 5.0
BEHIND_S = 1.0  # a replica that was behind is asked again after so long
FAIR_TIME_S = 0.25  # A host that was given less and was late is not to blame: one hasty caller must not put it aside.
FAIR_MULTIPLE = 5.0  # … nor one that was given less than so many times what it usually takes, where that is known,
FAIR_LEAST_S = 0.05  # or less than this.
HEDGE_PRIOR_S = 0.05  # Another host is asked as well after so long, until it is known how long calls usually take,
HEDGE_LEAST_S = 0.005  # and never sooner than this.
LEAST_ANSWERS = 4  # Fewer say nothing about how long they usually take.
LOSSES = 2  # A host whose answers in a row came too late to be used is put aside.

Key = tuple[str, int]  # a collection's uuid and a shard's number


@dataclass(slots=True, eq=False)
class _Health:
    """How many calls in a row have failed, and until when no more are made if there is another to ask."""

    failures: int = 0
    losses: int = 0
    aside_until: float = 0.0

    def failed(self) -> None:
        self.aside_until = _now() + min(LAST_ASIDE_S, FIRST_ASIDE_S * 2.0 ** min(self.failures, 20))
        self.failures += 1

    def lost(self) -> None:
        self.losses += 1
        if self.failures or self.losses >= LOSSES:
            self.failed()

    def trying(self) -> None:
        """Keep others away for as long as the call takes that tries whether it is well again."""
        if self.failures:
            self.aside_until = max(self.aside_until, _now() + LAST_ASIDE_S)


@dataclass(slots=True, eq=False)
class Replica:
    """
    A host, its health and its load, as this process knows them.

    *local* hosts are in this process; the others are given a *breaker* before they are asked. What fails is put aside,
    twice as long each time, which means that others are asked before it; then one call tries it: the whole host where
    it did not answer, and one shard of it where that could not. A host that goes on failing opens its breaker, and is
    not asked at all.
    """

    host: ShardHost
    local: bool = False
    in_flight: int = 0
    breaker: Breaker | None = None
    applied: dict[Key, int] = field(default_factory=dict)
    _health: _Health = field(default_factory=_Health)
    _failing: dict[Key, _Health] = field(default_factory=dict)
    _behind_until: dict[Key, float] = field(default_factory=dict)
    _usual: dict[str, RollingQuantile] = field(default_factory=dict)

    @property
    def refuses(self) -> bool:
        """Whether its breaker lets no call through now."""
        return self.breaker is not None and self.breaker.would_refuse()

    def sound(self, key: Key) -> bool:
        """Whether nothing is held against it: it answers, and its shard is whole and caught up as far as is known."""
        closed = self.breaker is None or self.breaker.state == "closed"
        return closed and not self._health.failures and key not in self._failing and not self.behind(key)

    def took(self, verb: str, seconds: float) -> None:
        """Note how long an answer took."""
        usual = self._usual.get(verb)
        if usual is None:
            usual = self._usual[verb] = RollingQuantile(least=LEAST_ANSWERS)
        usual.note(seconds)

    def hedge_after_s(self, verb: str) -> float:
        """Return after how long without an answer another host is asked too: what 95 of 100 answers take."""
        usual_s = self._usual_s(verb)
        return HEDGE_PRIOR_S if usual_s is None else max(HEDGE_LEAST_S, usual_s)

    def fair_s(self, verb: str) -> float:
        """Return the time that a call must have been given for the host to be to blame when it is late."""
        usual_s = self._usual_s(verb)
        return FAIR_TIME_S if usual_s is None else min(FAIR_TIME_S, max(FAIR_LEAST_S, FAIR_MULTIPLE * usual_s))

    def _usual_s(self, verb: str) -> float | None:
        usual = self._usual.get(verb)
        return None if usual is None else usual.value

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
            if self._health.failures or self._health.losses or failing is not None:
                self.answered(key)
        finally:
            self.in_flight -= 1

    def failed(self, key: Key, *, whole: bool) -> None:
        """Note that a call failed: *whole* says that the host did not answer at all."""
        if whole:
            self._health.failed()
        else:
            self._failing.setdefault(key, _Health()).failed()

    def lost(self) -> None:
        """Note that another host, asked later, answered before this one."""
        self._health.lost()

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
    behind; then the fallback index; and those put aside last, as they may be back. Those whose breakers are open are
    left out.
    """
    if len(replicas) == 1 and fallback is None:
        return [] if replicas[0].refuses else list(replicas)
    now = _now()
    replicas = [replica for replica in replicas if not replica.refuses]
    if fallback is not None and fallback.refuses:
        fallback = None
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
