"""Searches at a steady rate through the front Service, on fresh and on kept-alive connections, each sent once."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.chaos.faults import texts

FRONT = "http://search"
COLLECTION = "notes"
K = 10
_SHARDS = 4
_QUESTION_WORDS = 9
_KEPT_POOLS = 6
_TIMEOUT_S = 10.0
_BATCH = 50

Flags = frozenset[str]


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one search: when it was sent and over (`time.monotonic`), on which kind of connection, what it said."""

    sent: float
    done: float
    kept: bool
    status: int
    flags: Flags
    coverage: float
    hits: int
    trouble: str = ""

    @property
    def failed(self) -> bool:
        """Whether it was no answer, or not one with all the hits that were asked for."""
        return self.status != 200 or self.hits != K

    def well(self, may_say: Flags) -> bool:
        """Whether it is an answer of all shards, with no other flags than it may have."""
        return not self.failed and self.flags <= may_say and self.coverage == 1.0


class Load:
    """
    *rate_per_s* searches, no two alike, for as long as `running`; every second one on a connection that is kept.

    The share *reranked* of them asks for that: for all of them a small machine, which is the whole cluster here, has no time.
    """

    def __init__(self, rate_per_s: float, document_count: int, *, reranked: float) -> None:
        found = list(itertools.islice(texts(), document_count))
        self._documents = [{"id": id_, "title": title, "text": text} for id_, title, text in found]
        self._questions = [" ".join(text.split()[:_QUESTION_WORDS]) for _, _, text in found]
        self._rate_per_s = rate_per_s
        self._reranked = reranked
        self._dice = random.Random(1)
        self.replies: list[Reply] = []

    async def write_documents(self) -> int:
        """Make the collection, and wait until shards have all documents; return how many. Raises ClientError."""
        timeout = aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(FRONT, raise_for_status=True, timeout=timeout) as client:
            await client.post("/collections", json={"name": COLLECTION, "shards": _SHARDS})
            for first in range(0, len(self._documents), _BATCH):
                batch = {"documents": self._documents[first : first + _BATCH]}
                async with client.post(f"/collections/{COLLECTION}/documents", json=batch) as reply:
                    answer = await reply.json()
                    assert answer["applied"], answer
                    assert not answer["failed"], answer
        return len(self._documents)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Send searches until the block is left, then wait for the last answers."""
        stop = asyncio.Event()
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            fresh = await stack.enter_async_context(_client(aiohttp.TCPConnector(force_close=True, limit=0)))
            kept = [
                # A pool each, so that all of their connections are used in turn, and with them all pods.
                await stack.enter_async_context(_client(aiohttp.TCPConnector(limit=0, keepalive_timeout=60)))
                for _ in range(_KEPT_POOLS)
            ]
            group.create_task(self._send(stop, group, fresh, kept))
            try:
                yield self
            finally:
                stop.set()

    async def until_well(self, in_a_row: int, within_s: float, may_say: Flags) -> bool:
        """Wait until the last searches that were sent from now on say no more than they may; return whether they were in time."""
        since = time.monotonic()
        while time.monotonic() < since + within_s:
            last = sorted((reply for reply in self.replies if reply.sent >= since), key=lambda reply: reply.sent)
            if len(last) >= in_a_row and all(reply.well(may_say) for reply in last[-in_a_row:]):
                return True
            await asyncio.sleep(0.1)
        return False

    async def _send(
        self,
        stop: asyncio.Event,
        group: asyncio.TaskGroup,
        fresh: aiohttp.ClientSession,
        kept: Sequence[aiohttp.ClientSession],
    ) -> None:
        due = time.monotonic()
        for number in itertools.count():
            if stop.is_set():
                return
            client = fresh if number % 2 else kept[number // 2 % len(kept)]
            group.create_task(self._ask(number, client, kept=client is not fresh))
            due += 1 / self._rate_per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _ask(self, number: int, client: aiohttp.ClientSession, *, kept: bool) -> None:
        question = self._questions[number % len(self._questions)]
        body = {
            "query": f"{question} {number}",
            "collection": COLLECTION,
            "k": K,
            "include": ["metadata"],
            "rerank": self._dice.random() < self._reranked,
        }
        sent = time.monotonic()
        status, answer, trouble = 0, {}, ""
        try:
            async with client.post("/search", json=body) as reply:
                status, answer = reply.status, await reply.json()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            status, trouble = 0, repr(error)
        if status not in (0, 200):
            trouble = answer.get("error", {}).get("message", "")
        self.replies.append(
            Reply(
                sent,
                time.monotonic(),
                kept,
                status,
                frozenset(answer.get("degraded", ())),
                answer.get("coverage", {}).get("ratio", 0.0),
                len(answer.get("hits", ())),
                trouble,
            )
        )


def _client(connector: aiohttp.TCPConnector) -> Any:
    return aiohttp.ClientSession(FRONT, connector=connector, timeout=aiohttp.ClientTimeout(_TIMEOUT_S))


def summary(replies: Sequence[Reply]) -> str:
    """Return how many of each kind there are."""
    kinds = Counter(
        f"{'kept' if reply.kept else 'fresh'} connection: {reply.status} {sorted(reply.flags)}"
        f" coverage {reply.coverage:g} {reply.hits} hits {reply.trouble}".strip()
        for reply in replies
    )
    return "; ".join(f"{count}x {kind}" for kind, count in kinds.most_common(5))
