"""
Drives our own storage in the process, by the commands of peers/vectors/drive.py: ledger, shards and router, without HTTP.

`search` also answers with the time that each question spent inside the shard, whose part the router's is not.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import orjson

from benchmarks.vectors import DIM, Condition, fields, texts
from services.common.deadline import Deadline
from services.search.app import vector_options
from services.search.documents import content_hash, embedded_hash
from services.search.filters import parse_filter
from services.search.ledger.sqlite import SqliteLedger
from services.search.ports import Collection, LedgerDocument, RetrievalQuery
from services.search.settings import SearchSettings
from services.search.shards.directory import ShardDirectory
from services.search.shards.host import HostOptions, LocalHost
from services.search.shards.lexical import question_terms
from services.search.shards.replicas import OneHost, Replica
from services.search.shards.router import ShardRouter

BATCH = 500
QUIET_S = 6.0

_PATIENCE_S = 3600.0


@dataclass(slots=True)
class Stack:
    """What is open, and the vectors to load and to ask for."""

    ledger: SqliteLedger
    host: LocalHost
    router: ShardRouter
    collection: Collection
    vectors: Any
    queries: Any

    async def load(self, rows: int) -> dict[str, float]:
        """Write the first *rows* vectors with text and fields, wait until nothing is left to build, and take a snapshot."""
        began = time.perf_counter()
        writes: set[asyncio.Task[None]] = set()
        for start in range(0, rows, BATCH):
            documents = await asyncio.to_thread(self._documents, start, min(start + BATCH, rows))
            if len(writes) >= 2:
                await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
                writes = {write for write in writes if not write.done() or write.result()}
            writes.add(asyncio.create_task(self._write(documents)))
        await asyncio.gather(*writes)
        seq = self.ledger.heard_seq(self.collection.uuid)
        await self.router.wait_applied(self.collection, seq, Deadline.after(_PATIENCE_S))
        loaded = time.perf_counter()
        finish_s = await self._settle(loaded)
        built = time.perf_counter()
        await self.router.snapshot(self.collection, Deadline.after(_PATIENCE_S))
        return {"load_s": loaded - began, "finish_s": finish_s, "snapshot_s": time.perf_counter() - built}

    async def search(self, numbers: Sequence[int], limit: int, condition: Condition) -> dict[str, Any]:
        """Ask the questions one after the other."""
        expression = parse_filter({condition[0]: condition[1]}) if condition else None
        rows, seconds, shard_seconds = [], [], []
        for number in numbers:
            query = RetrievalQuery(limit, self.queries[number], filter=expression)
            began = time.perf_counter()
            found = await self.router.retrieve(self.collection, query, Deadline.after(10.0))
            seconds.append(time.perf_counter() - began)
            shard_seconds.append(sum(found.timings_ms.values()) / 1e3)
            best = sorted(found.candidates, key=lambda candidate: -(candidate.dense or 0.0))[:limit]
            rows.append([int(candidate.id) for candidate in best])
        return {"rows": rows, "seconds": seconds, "shard_seconds": shard_seconds}

    async def _write(self, documents: Sequence[LedgerDocument]) -> None:
        written = await self.ledger.append(self.collection.uuid, documents)
        self.router.notify(self.collection, written.seq)

    def _documents(self, start: int, stop: int) -> list[LedgerDocument]:
        vectors = np.array(self.vectors[start:stop], np.float32)
        made = []
        for row, text, vector in zip(range(start, stop), texts(start, stop - start), vectors, strict=True):
            raw, metadata = vector.tobytes(), fields(row)
            hashes = content_hash(text, None, orjson.dumps(metadata), raw), embedded_hash(None, text, raw)
            made.append(LedgerDocument(str(row), text, None, metadata, vector, *hashes))
        return made

    async def _settle(self, loaded: float) -> float:
        """Wait until the process has done next to nothing for a while; return how long it worked before that."""
        busy_until = time.perf_counter()
        while time.perf_counter() - busy_until < QUIET_S:
            before_s = time.process_time()
            await asyncio.sleep(0.3)
            if time.process_time() - before_s > 0.06:
                busy_until = time.perf_counter()
        return busy_until - loaded


@asynccontextmanager
async def opened(options: argparse.Namespace) -> AsyncIterator[Stack]:
    """Open the storage with the settings' defaults, and close it with a snapshot."""
    directory: Path = options.directory
    settings = SearchSettings(data_dir=directory)
    ledger = await SqliteLedger.open(directory / "ledger.db")
    shard_directory = ShardDirectory(
        directory / "shards",
        vector_options(settings, compact=options.compact),
        readers=settings.search_threads,
        writers=settings.write_threads,
        maintenance_share=1.0,
    )
    host = LocalHost("local", ledger, shard_directory, HostOptions())
    router = ShardRouter(OneHost(Replica(host, local=True), None), question_terms)
    collection = await ledger.find_collection("bench")
    if collection is None:
        collection = Collection("bench", "bench", None, "own-vectors", DIM, options.shards, time.time())
        await ledger.create_collection(collection)
    await host.start()
    try:
        yield Stack(ledger, host, router, collection, np.load(options.vectors, mmap_mode="r"), np.load(options.queries))
    finally:
        await router.aclose()
        await host.aclose()
        await asyncio.to_thread(shard_directory.close)
        await ledger.aclose()


async def obey(options: argparse.Namespace, answers: TextIO) -> None:
    """Obey the commands on standard input until it ends."""
    async with opened(options) as stack:
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            answer: dict[str, Any]
            if command["do"] == "load":
                answer = await stack.load(command["rows"])
            else:
                condition = tuple(command["filter"]) if command["filter"] else None
                answer = await stack.search(command["queries"], command["limit"], condition)
            print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Read the command line and obey."""
    parser = argparse.ArgumentParser()
    for name in ("directory", "vectors", "queries"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--compact", action="store_true", help="keep vectors as the fallback index does")
    answers, sys.stdout = sys.stdout, sys.stderr  # What a library prints is no answer.
    asyncio.run(obey(parser.parse_args(), answers))


if __name__ == "__main__":
    main()
