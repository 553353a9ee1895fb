"""Hosts over the ledger and the shards of tests/shard_hosts.py, and what tests ask of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.search.ports import Collection, ShardQuery
from services.search.shards.host import HostOptions, LocalHost
from tests.shard_hosts import BOOKS, MemoryDirectory, MemoryLedger, soon

QUESTION = ShardQuery(1000, terms=["word"])
MakeHost = Callable[..., LocalHost]


@asynccontextmanager
async def making(ledger: MemoryLedger, directory: MemoryDirectory) -> AsyncIterator[MakeHost]:
    """Yield what makes a host of options, with polls 0.03 s apart; at the end all are closed, and nothing of them runs."""
    made: list[LocalHost] = []

    def make(*, poll_s: float = 0.03, **options) -> LocalHost:
        made.append(LocalHost("local", ledger, directory, HostOptions(poll_s=poll_s, **options)))
        return made[-1]

    yield make
    for host in made:
        await host.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def search(host: LocalHost, collection: Collection = BOOKS) -> set[str]:
    """Return the ids of the documents with the word "word"."""
    answers = [await host.search(collection, shard, QUESTION, soon()) for shard in range(collection.shards)]
    return {candidate.id for answer in answers for candidate in answer.candidates}


async def applied(host: LocalHost, seq: int, collection: Collection = BOOKS) -> None:
    """Wait until all shards have applied *seq*; fail if they do not."""
    for shard in range(collection.shards):
        assert await host.wait_applied(collection, shard, seq, soon())
