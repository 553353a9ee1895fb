"""Runs one cell of the matrix: steady load, the fault, the mending, and a verdict on every reply."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from tests.chaos.faults import COLLECTION, Deployment
from tests.chaos.matrix import UNRESOLVED, Cell, Flags, Oracle
from tests.search_process import SearchProcess

# What a busy machine adds between the answer and this process, which also carries the proxies.
OVERSHOOT_AT_MOST_MS: Final = 250
OVERLAP_AT_LEAST: Final = 0.95
RECOVERY_AT_MOST_S: Final = 10.0
GROWTH_AT_MOST_MB: Final = 128.0
K: Final = 10
_CLEAN_IN_A_ROW: Final = 20
_ORACLES_AT_ONCE: Final = 4
_NO_FLAGS: Final[Flags] = frozenset()
_PARTIAL: Final[Flags] = frozenset({"shards_partial"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one search: when it was sent and answered (`time.monotonic`), and what it said."""

    question: int
    sent: float
    done: float
    status: int
    flags: Flags
    hits: tuple[str, ...]
    coverage: float
    trouble: str = ""  # why there is no answer, or what it lacks


@dataclass(frozen=True, slots=True)
class Pace:
    """
    How hard a cell is: how long it lasts before the fault and under it, searches a second, and the time each has.

    *stalled_most* searches may lack a shard, flagged, as a part comes or goes: so many are sent in the tenth of a second
    in which a process that starts, or another user of the machine, leaves the others no processor.
    """

    calm_s: float
    fault_s: float
    rate_per_s: float
    timeout_ms: int
    stalled_most: int = 0


@dataclass(slots=True)
class Outcome:
    """What a cell measured, and in *complaints* all that was not as it must be."""

    cell: Cell
    searches: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    overlap: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    worst_ms: float = 0.0
    back_s: float | None = None
    growth_mb: float = 0.0
    complaints: list[str] = field(default_factory=list)


class Load:
    """Searches at a steady rate, each sent at its time whatever became of those before; no two alike."""

    def __init__(self, search: SearchProcess, deployment: Deployment, pace: Pace, *, cache: bool) -> None:
        self._pace = pace
        self._questions = deployment.questions
        self._cache = cache
        self._client = httpx2.AsyncClient(base_url=search.url, trust_env=False, timeout=30, limits=_many())
        self._numbers = deployment.numbers
        self.replies: list[Reply] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Send searches until the block is left, then wait for the last answers."""
        stop = asyncio.Event()
        async with self._client, asyncio.TaskGroup() as group:
            group.create_task(self._send(stop, group))
            try:
                yield self
            finally:
                stop.set()

    async def clean(self, since: float, *, within_s: float) -> float | None:
        """Wait until the last searches that were sent after *since* have no flag; return when the first of them was sent."""
        give_up_at = time.monotonic() + within_s
        while time.monotonic() < give_up_at:
            last = sorted((reply for reply in self.replies if reply.sent >= since), key=lambda reply: reply.sent)
            last = last[-_CLEAN_IN_A_ROW:]
            if len(last) == _CLEAN_IN_A_ROW and all(_well(reply) for reply in last):
                return last[0].sent
            await asyncio.sleep(0.05)
        return None

    async def _send(self, stop: asyncio.Event, group: asyncio.TaskGroup) -> None:
        due = time.monotonic()
        while not stop.is_set():
            group.create_task(self._ask(next(self._numbers)))
            due += 1 / self._pace.rate_per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _ask(self, number: int) -> None:
        question = number % len(self._questions)
        body = {
            **request(self._questions[question]),
            "timeout_ms": self._pace.timeout_ms,
            "cache": self._cache,
            # Without highlights it changes no hit, and makes each search another one for the cache.
            "highlights_max_chars": 20 + number % 9_000,
        }
        sent = time.monotonic()
        try:
            reply = await self._client.post("/search", json=body)
        except httpx2.HTTPError as error:
            self.replies.append(Reply(question, sent, time.monotonic(), 0, _NO_FLAGS, (), 0.0, repr(error)))
            return
        done = time.monotonic()
        if reply.status_code != 200:
            why = (
                reply.json()["error"]["message"] if reply.headers["content-type"].startswith("application/json") else ""
            )
            self.replies.append(Reply(question, sent, done, reply.status_code, _NO_FLAGS, (), 0.0, why))
            return
        found = reply.json()
        hits = tuple(hit["id"] for hit in found["hits"])
        flags = frozenset(found["degraded"])
        coverage = found["coverage"]
        missing = f"({coverage['shards']} {coverage['failures']})" if coverage["ratio"] < 1 else ""
        self.replies.append(Reply(question, sent, done, 200, flags, hits, coverage["ratio"], missing))


def request(question: str) -> dict[str, Any]:
    """Return the search that is made of a question everywhere."""
    return {"query": question, "collection": COLLECTION, "k": K, "include": ["metadata"]}


def run_cell(cell: Cell, deployment: Deployment, pace: Pace) -> Outcome:
    """Run *cell* and return what was measured; the deployment is well before and, if the product is, afterwards."""
    return asyncio.run(_run(cell, deployment, pace))


async def _run(cell: Cell, deployment: Deployment, pace: Pace) -> Outcome:
    nameless = cell.fault == UNRESOLVED
    if nameless:
        search = await asyncio.to_thread(deployment.nameless, cell.shards, cell.parts)
    else:
        search = await asyncio.to_thread(deployment.search, cell.shards)
    outcome = Outcome(cell)
    async with Load(search, deployment, pace, cache=cell.about_the_cache).running() as load:
        if not nameless and await load.clean(0.0, within_s=30) is None:
            outcome.complaints.append(f"not well before the fault: {_summary(load.replies[-50:])}")
        began = time.monotonic()
        await asyncio.sleep(0.0 if nameless else pace.calm_s)
        resident_mb = _resident_mb(search)
        hurting = time.monotonic()
        try:
            await asyncio.to_thread(deployment.hurt, cell.parts, cell.fault)
            hurt = time.monotonic()
            await asyncio.sleep(pace.fault_s)
            mending = time.monotonic()
            outcome.growth_mb = _resident_mb(search) - resident_mb
        finally:
            await asyncio.to_thread(deployment.mend, cell.parts, cell.fault)
        mended = time.monotonic()
        back = await load.clean(mended, within_s=RECOVERY_AT_MOST_S * 2)
        outcome.back_s = None if back is None else back - mended
    moments = _Moments(began, hurting, hurt, mending, mended)
    under = list(moments.under(load.replies))
    outcome.complaints += _complaints(cell, load.replies, moments, pace.stalled_most)
    _measure(outcome, under, pace.timeout_ms)
    if nameless:
        search.kill()
        search = await asyncio.to_thread(deployment.search, cell.shards)
    outcome.overlap = await _overlap(deployment, search, cell.oracle, under)
    if outcome.overlap < OVERLAP_AT_LEAST:
        outcome.complaints.append(f"overlap@{K} with the oracle {outcome.overlap:.3f}")
    return outcome


@dataclass(frozen=True, slots=True)
class _Moments:
    began: float
    hurting: float
    hurt: float
    mending: float
    mended: float

    def calm(self, replies: Sequence[Reply]) -> Iterator[Reply]:
        return (reply for reply in replies if reply.sent >= self.began and reply.done < self.hurting)

    def between(self, replies: Sequence[Reply]) -> Iterator[Reply]:
        """Yield those that met both: the part was well for some of their time."""
        for reply in replies:
            onset = reply.sent < self.hurt and reply.done >= self.hurting
            if onset or (reply.sent < self.mending <= reply.done) or reply.sent >= self.mending:
                yield reply

    def under(self, replies: Sequence[Reply]) -> Iterator[Reply]:
        return (reply for reply in replies if reply.sent >= self.hurt and reply.done < self.mending)


def _complaints(cell: Cell, replies: Sequence[Reply], moments: _Moments, stalled_most: int) -> list[str]:
    calm, under = list(moments.calm(replies)), list(moments.under(replies))
    possible = frozenset().union(*cell.flags) | cell.recovering
    met = [reply for reply in moments.between(replies) if reply.status != 200 or not reply.flags <= possible]
    stalled = [reply for reply in met if reply.status == 200 and reply.flags <= possible | _PARTIAL]
    borne = stalled if len(stalled) <= stalled_most else []
    wrong = {
        "before the fault": [reply for reply in calm if not _well(reply)],
        "under the fault": [
            reply
            for reply in under
            if reply.status != 200 or reply.flags not in cell.flags or reply.coverage != cell.coverage
        ],
        "as it came and went": [reply for reply in met if reply not in borne],
    }
    found = [
        f"{when}: {len(bad)} of {len(replies)} replies wrong: {_summary(bad)}" for when, bad in wrong.items() if bad
    ]
    if len(under) < 20:
        found.append(f"only {len(under)} searches were answered under the fault")
    return found


def _measure(outcome: Outcome, under: Sequence[Reply], timeout_ms: int) -> None:
    took_ms = sorted((reply.done - reply.sent) * 1000 for reply in under)
    if not took_ms:
        return
    outcome.searches = len(under)
    outcome.flags = Counter(" + ".join(sorted(reply.flags)) or "none" for reply in under)
    outcome.p50_ms, outcome.worst_ms = took_ms[len(took_ms) // 2], took_ms[-1]
    outcome.p99_ms = took_ms[min(len(took_ms) - 1, int(len(took_ms) * 0.99))]
    if outcome.p99_ms > timeout_ms + OVERSHOOT_AT_MOST_MS:
        outcome.complaints.append(f"p99 {outcome.p99_ms:.0f} ms is over the deadline of {timeout_ms} ms")
    if outcome.growth_mb > GROWTH_AT_MOST_MB:
        outcome.complaints.append(f"search grew by {outcome.growth_mb:.0f} MB")
    if outcome.back_s is None or outcome.back_s > RECOVERY_AT_MOST_S:
        outcome.complaints.append(f"not back to normal {RECOVERY_AT_MOST_S:.0f} s after the mending: {outcome.back_s}")


async def _overlap(deployment: Deployment, search: SearchProcess, oracle: Oracle, under: Sequence[Reply]) -> float:
    """Return the mean share of the oracle's hits that the replies have."""
    if oracle.router is not None:
        search = await asyncio.to_thread(deployment.oracle, oracle.router)
    known = deployment.answers.setdefault((search.url, repr(sorted(oracle.request.items()))), {})
    async with httpx2.AsyncClient(base_url=search.url, trust_env=False, timeout=30) as client:
        gate = asyncio.Semaphore(_ORACLES_AT_ONCE)

        async def learn(question: int) -> None:
            async with gate:
                body = {
                    **request(deployment.questions[question]),
                    **oracle.request,
                    "cache": False,
                    "timeout_ms": 20_000,
                }
                reply = (await client.post("/search", json=body)).raise_for_status().json()
                known[question] = frozenset(hit["id"] for hit in reply["hits"])

        await asyncio.gather(*(learn(number) for number in {reply.question for reply in under} - known.keys()))
    shares = [len(known[r.question] & set(r.hits)) / max(1, len(known[r.question])) for r in under]
    return sum(shares) / len(shares) if shares else 0.0


def _well(reply: Reply) -> bool:
    return reply.status == 200 and not reply.flags and reply.coverage == 1.0


def _summary(replies: Sequence[Reply]) -> str:
    kinds = Counter(
        f"{reply.status} {sorted(reply.flags)} coverage {reply.coverage} {reply.trouble}".strip() for reply in replies
    )
    return "; ".join(f"{count}x {kind}" for kind, count in kinds.most_common(4))


def _resident_mb(process: SearchProcess) -> float:
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024 / 1e6


def _many() -> httpx2.Limits:
    return httpx2.Limits(max_connections=1000, max_keepalive_connections=200)
