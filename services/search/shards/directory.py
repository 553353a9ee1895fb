"""Where a host keeps its shards on disk: `<directory>/<collection uuid>/<shard>/`, held by one process at a time."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path

from services.search.claim import Claim
from services.search.ports import Collection, ShardStanding
from services.search.shards import files
from services.search.shards.files import Damaged
from services.search.shards.local import LocalShard
from services.search.shards.pace import Pace
from services.search.shards.snapshot import Snapshots
from services.search.shards.threads import ShardThreads, search_threads
from services.search.shards.vectors import VectorOptions, use_one_thread


class ShardDirectory:
    """
    Opens the shards below *directory*, and has the threads that they work in.

    Use: one object for each directory; `close` it when all its shards are closed.
    """

    def __init__(
        self, directory: Path, vectors: VectorOptions, *, readers: int, writers: int, maintenance_share: float
    ) -> None:
        """
        Claim *directory*, making it if need be.

        Raises:
            Conflict: Another process has it; the message names the process.
        """
        self._claim = Claim(directory)
        self._directory = directory
        self._vectors = vectors
        self._pace = Pace(maintenance_share)
        self._threads = ShardThreads(
            readers=search_threads(readers),
            writers=ThreadPoolExecutor(writers, thread_name_prefix="shard-write", initializer=use_one_thread),
            maintenance=ThreadPoolExecutor(1, thread_name_prefix="shard-maintenance", initializer=use_one_thread),
            pace=self._pace,
        )

    def open(self, collection: Collection, number: int, use_snapshots: bool) -> LocalShard:
        """Open a shard, from its newest good snapshot or from nothing; blocks while it reads files."""
        return LocalShard.open(
            collection,
            number,
            self._shard(collection.uuid, number),
            threads=self._threads,
            vectors=self._vectors,
            use_snapshots=use_snapshots,
        )

    def standing(self, collection: Collection, number: int) -> ShardStanding | None:
        """Return how a shard stood when its newest snapshot was made, as the manifest says; None without a snapshot."""
        snapshots = Snapshots(self._shard(collection.uuid, number))
        for name in snapshots.names():
            try:
                found = snapshots.manifest(name)
            except Damaged:
                continue
            return ShardStanding(number, found.seq, found.documents, found.next_row, snapshot_seq=found.seq)
        return None

    def uuids(self) -> list[str]:
        """Return the collections of which there is anything."""
        return sorted(child.name for child in self._directory.iterdir() if child.is_dir())

    def remove(self, uuid: str) -> None:
        """Remove everything of a collection, whose shards are closed. Raises OSError."""
        files.remove(self._directory / uuid)

    def disk_bytes(self) -> tuple[float, float]:
        """Return how much of its disk is free, and all of it; NaN while that cannot be told."""
        try:
            usage = shutil.disk_usage(self._directory)
        except OSError:
            return nan, nan
        return usage.free, usage.total

    def hurry(self) -> None:
        """Let maintenance that is under way give up: the process is stopping."""
        self._pace.stop()

    def close(self) -> None:
        """End the threads, which blocks until what they do is done, and give the directory up."""
        self._pace.stop()
        for pool in (self._threads.maintenance, self._threads.readers, self._threads.writers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._claim.release()

    def _shard(self, uuid: str, number: int) -> Path:
        return self._directory / uuid / str(number)
