"""What is done to the cluster under load, what its replies may say meanwhile, and the judgement of every one of them."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.cluster.cluster import Cluster
from tests.cluster.load import Flags, Load, Reply, summary
from tests.cluster.timeline import Meter, Timeline

_NONE: Flags = frozenset()
# There is one Redis, and it keeps nothing on disk: without it searches go without the shared cache, and say so.
_WITHOUT_REDIS: Flags = frozenset({"cache_unavailable"})
# What answers say where the machine has other things to do: parts were late, and Redis has 50 ms.
_LATE: Flags = frozenset({"embedding_late", "rerank_late", "rerank_partial", "rerank_reduced", "cache_unavailable"})
_WELL_IN_A_ROW = 30
_BACK_WITHIN_S = 30.0
_CALM_S = 5.0
ROLLED = ("embedding", "rerank", "search", "shard-0", "shard-1", "fallback", "redis", "postgres")


@dataclass(slots=True)
class Act:
    """One thing that is done: from when to when, and with which flags replies may come meanwhile."""

    name: str
    began: float
    may_say: Flags
    ended: float = float("inf")
    well_again: bool = True


@dataclass
class Judgement:
    """All replies of a run, held against what may be said when; *complaints* has all that was not as it must be."""

    searches: int = 0
    failed: int = 0
    complaints: list[str] = field(default_factory=list)


class Play:
    """Does one thing after the other to *cluster* while *load* runs; on a *busy* machine parts may be late at any time."""

    def __init__(self, cluster: Cluster, load: Load, timeline: Timeline, *, busy: bool) -> None:
        self._always: Flags = _LATE if busy else _NONE
        self._cluster = cluster
        self._load = load
        self.timeline = timeline
        self.acts: list[Act] = []

    @asynccontextmanager
    async def act(self, name: str, may_say: Flags = _NONE) -> AsyncIterator[None]:
        """Do what the block does, and then wait until answers are as they should be; say how it went."""
        may_say |= self._always
        done, meter = Act(name, time.monotonic(), may_say), Meter()
        self.acts.append(done)
        self.timeline.tell(f"== {name}" + (f" (may be flagged: {', '.join(sorted(may_say))})" if may_say else ""))
        yield
        done.well_again = await self._load.until_well(_WELL_IN_A_ROW, _BACK_WITHIN_S, self._always)
        done.ended = time.monotonic()
        replies = [reply for reply in self._load.replies if reply.sent >= done.began]
        wrong = [reply for reply in replies if not reply.well(may_say)]
        flags = Counter(flag for reply in replies for flag in reply.flags)
        took_ms = sorted((reply.done - reply.sent) * 1000 for reply in replies)
        self.timeline.tell(
            f"   {len(replies)} searches, {sum(reply.failed for reply in replies)} failed, flags {dict(flags) or 'none'},"
            f" p50 {took_ms[len(took_ms) // 2]:.0f} ms, p99 {took_ms[int(len(took_ms) * 0.99)]:.0f} ms,"
            f" worst {took_ms[-1]:.0f} ms; {meter.busy_cores():.1f} of {os.cpu_count()} cores busy"
        )
        if wrong:
            self.timeline.tell(f"   WRONG: {_told(wrong, self.timeline)}")

    async def whole(self) -> None:
        """Everything: calm, every workload rolled, a replica killed, a node drained, calm."""
        await self.begin()
        await self.calm()
        for workload in ROLLED:
            await self.roll(workload)
        await self.kill_a_replica("shard-0")
        await self.drain()
        await self.calm()

    async def short(self) -> None:
        """A Deployment rolled and a replica killed at the same time."""
        await self.begin()
        async with self.act("search is rolled, and meanwhile a replica of shard-0 is killed"):
            await asyncio.gather(self._cluster.roll("search"), self._kill("shard-0"))

    async def begin(self) -> None:
        """The first searches meet caches that are empty, and services that do not know yet how long things take."""
        async with self.act("searches begin", _LATE):
            pass

    async def calm(self) -> None:
        """Nothing is done."""
        async with self.act("nothing is done"):
            await asyncio.sleep(_CALM_S)

    async def roll(self, workload: str) -> None:
        """All pods of a workload are made anew."""
        async with self.act(f"{workload} is rolled", _WITHOUT_REDIS if workload == "redis" else _NONE):
            await self._cluster.roll(workload)

    async def kill_a_replica(self, workload: str) -> None:
        """One of a shard node's pods crashes."""
        async with self.act(f"a replica of {workload} is killed"):
            await self._kill(workload)

    async def _kill(self, workload: str) -> None:
        pod = random.choice(self._cluster.of(workload))
        self.timeline.tell(f"{pod.name}: SIGKILL")
        pod.kill()
        await asyncio.sleep(1)
        await self._cluster.until_settled()

    async def drain(self) -> None:
        """The node that Redis is on is drained, so that there is most to lose, and comes back."""
        home = self._cluster.of("redis")[0].place.node
        node = next(node for node in self._cluster.nodes if node.name == home)
        for other, pods in self._cluster.by_node():
            self.timeline.tell(f"   {other.name}: {', '.join(pods)}")
        async with self.act(f"{home} is drained", _WITHOUT_REDIS):
            await self._cluster.drain(node)
            await self._cluster.until_settled()
        node.cordoned = False


def judge(play: Play, load: Load, cluster: Cluster) -> Judgement:
    """Return what is to be said against a play that is over: replies, and pods that did not end well."""
    found = Judgement(len(load.replies), sum(reply.failed for reply in load.replies))
    wrong: dict[str, list[Reply]] = {}
    for reply in load.replies:
        during = [act for act in play.acts if act.began <= reply.done and reply.sent <= act.ended] or play.acts[-1:]
        may_say = _NONE.union(*(act.may_say for act in during))
        if not reply.well(may_say):
            wrong.setdefault(during[0].name, []).append(reply)
    found.complaints = [f"while {name}: {_told(replies, play.timeline)}" for name, replies in wrong.items()]
    found.complaints += [f"{act.name}: not well again in time" for act in play.acts if not act.well_again]
    for end in cluster.ended:
        if end.forced or end.status != 0:
            found.complaints.append(f"{end.pod} ended with status {end.status}{', by force' if end.forced else ''}")
    return found


def _told(replies: Sequence[Reply], timeline: Timeline) -> str:
    moments = ", ".join(f"{timeline.at(reply.sent):.1f}" for reply in replies[:8])
    return f"{len(replies)} replies wrong, at {moments} s: {summary(replies)}"
