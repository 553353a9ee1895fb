"""
What documents take, on disk and in memory, measured with a real ledger and a real shard: `python -m benchmarks.sizing`.

The constants of tercet/planning.py and docs/sizing.md are what this printed; a test holds the formulas to it.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from services.search.ledger.sqlite import SqliteLedger
from services.search.ports import Collection, LedgerDocument
from services.search.shards.local import LocalShard
from services.search.shards.slices import ledger_slice
from services.search.shards.threads import ShardThreads, search_threads
from services.search.shards.vectors import VectorOptions

_BATCH = 500
_VOCABULARY = 30_000
_ZIPF = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of everything that one shard's documents take, and how fast what was built was built."""

    rows: int
    ledger_bytes: int
    vector_bytes: int
    graph_bytes: int
    lexical_bytes: int
    store_bytes: int
    snapshot_bytes: int
    anonymous_bytes: int
    graph_rows_per_s: float
    lexical_rows_per_s: float


def texts(count: int, text_bytes: int, seed: int = 0) -> list[str]:
    """Return texts of half to one and a half *text_bytes* whose words are as frequent as Zipf's law has it."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(random.choice(letters, random.integers(2, 11))) for _ in range(_VOCABULARY)]
    weights = 1 / np.arange(1, _VOCABULARY + 1) ** _ZIPF
    share = weights / weights.sum()
    lengths = random.integers(text_bytes // 2, text_bytes + text_bytes // 2 + 1, count)
    chosen = (random.choice(_VOCABULARY, length // 3, p=share) for length in lengths)
    return [" ".join(words[i] for i in row)[:length] for row, length in zip(chosen, lengths.tolist(), strict=True)]


def documents(count: int, dim: int, text_bytes: int, fields: int) -> list[LedgerDocument]:
    """Return documents with clustered vectors; their fields are numbers and words of few values, in turn."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((200, dim)).astype(np.float32)
    vectors = centres[random.integers(0, 200, count)] + 0.5 * random.standard_normal((count, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made = []
    for n, text in enumerate(texts(count, text_bytes)):
        metadata = {f"field_{f}": (n * (f + 1) if f % 2 else f"value {n % 50}") for f in range(fields)}
        made.append(LedgerDocument(f"document-{n:09d}", text, None, metadata, vectors[n], b"c" * 16, b"e" * 16))
    return made


async def measure(directory: Path, count: int, *, dim: int, text_bytes: int, fields: int) -> Measured:
    """Fill a ledger and a shard of one collection in *directory*, let the shard come to rest, and measure both."""
    collection = Collection("uuid", "c", None, "f", dim, 1, 0.0)
    ledger = await SqliteLedger.open(directory / "ledger.db")
    await ledger.create_collection(collection)
    made = documents(count, dim, text_bytes, fields)
    for start in range(0, count, _BATCH):
        await ledger.append(collection.uuid, made[start : start + _BATCH])
    threads = ShardThreads(search_threads(1), ThreadPoolExecutor(1), ThreadPoolExecutor(1), lambda: None)
    options = VectorOptions(hnsw_rows=min(10_000, count // 2))
    place = directory / "shard"
    shard = LocalShard.open(collection, 0, place, threads=threads, vectors=options)
    async for page in ledger_slice(ledger, collection, 0):
        await shard.apply(page, page[-1].seq)
    graph_s = lexical_s = 0.0
    while True:
        began, before = time.monotonic(), shard.standing().segments
        if not await shard.maintain(idle=True):
            break
        if shard.standing().segments != before:
            graph_s += time.monotonic() - began
        else:
            lexical_s += time.monotonic() - began
    await shard.snapshot(ledger.epoch)
    await shard.aclose()
    await ledger.aclose()
    for pool in (threads.readers, threads.writers, threads.maintenance):
        pool.shutdown()
    return Measured(
        rows=count,
        ledger_bytes=_size(directory, "ledger.db"),
        vector_bytes=_size(place, "vectors/*.f32"),
        graph_bytes=_size(place, "vectors/*.faiss"),
        lexical_bytes=_size(place, "lexical/*"),
        store_bytes=_size(place, "store.sqlite"),
        snapshot_bytes=_size(place, "snapshots/*/*"),
        anonymous_bytes=_anonymous_of_open_shard(collection, place, options),
        graph_rows_per_s=count / max(graph_s, 1e-9),
        lexical_rows_per_s=count / max(lexical_s, 1e-9),
    )


def _size(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern) if path.is_file())


def _anonymous_of_open_shard(collection: Collection, place: Path, options: VectorOptions) -> int:
    """Return by how much the memory of a process of its own grows when it opens the shard."""
    command = [sys.executable, "-m", "benchmarks.sizing", "--open", str(place), "--dim", str(collection.dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def _open_and_weigh(place: Path, dim: int) -> None:
    threads = ShardThreads(search_threads(1), ThreadPoolExecutor(1), ThreadPoolExecutor(1), lambda: None)
    collection = Collection("uuid", "c", None, "f", dim, 1, 0.0)
    before = _anonymous_bytes()
    shard = LocalShard.open(collection, 0, place, threads=threads, vectors=VectorOptions())
    after = _anonymous_bytes()
    assert shard.documents
    sys.stdout.write(f"{after - before}\n")
    sys.stdout.flush()
    os._exit(0)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this needs Linux's /proc")


def main() -> None:
    """Measure and print, bytes by document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--text-bytes", type=int, default=1000)
    parser.add_argument("--metadata-fields", type=int, default=5)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open:
        _open_and_weigh(given.open, given.dim)
    with tempfile.TemporaryDirectory() as directory:
        shape = {"dim": given.dim, "text_bytes": given.text_bytes, "fields": given.metadata_fields}
        found = asyncio.run(measure(Path(directory), given.documents, **shape))
    for name, value in asdict(found).items():
        each = f" {value / found.rows:10.1f} a document" if name.endswith("_bytes") else ""
        print(f"{name:<20} {value:>14,.0f}{each}")
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
