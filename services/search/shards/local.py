"""
A shard on this machine: a vector index, a lexical index, an attribute index and a store, behind the Shard port.

It has no thread of its own. Searches run in the readers' pool; whatever writes runs in the writers' pool, one piece at
a time for each shard; what takes long (building segments, writing snapshots, auditing) runs beside both.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import structlog

from services.common.errors import BackendFailed, NotReady, TercetError
from services.search.claim import Claim
from services.search.ports import (
    AuditReport,
    Collection,
    LexicalStatistics,
    Match,
    Operation,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards.audit import Audit
from services.search.shards.opening import Opened, SnapshotOrigin, open_shard
from services.search.shards.pace import GivenUp
from services.search.shards.threads import ShardThreads, Turns
from services.search.shards.vectors import VectorOptions

_log = structlog.get_logger(__name__)

T = TypeVar("T")


class LocalShard:
    """
    A slice of a collection in a directory of its own, opened by `open` and closed by `aclose`.

    *origin* is the snapshot it was loaded from; None: it began empty. *problems* says what was damaged on the way.
    Calls after closing raise NotReady; what an index or the disk refuses raises BackendFailed.
    """

    def __init__(self, opened: Opened, claim: Claim, threads: ShardThreads, *, compact: bool) -> None:
        """Not called by users: see `open`."""
        self.origin: SnapshotOrigin | None = opened.origin
        self.problems: list[str] = opened.problems
        self._contents = opened.contents
        self._snapshots = opened.snapshots
        self._claim = claim
        self._threads = threads
        self._compact = compact
        self._turns = Turns(threads.writers)
        self._working: set[Future[Any]] = set()
        self._maintaining = asyncio.Lock()
        self._snapshotting = asyncio.Lock()
        self._snapshot_seq = opened.origin.seq if opened.origin else 0
        self._snapshot_generation = 0 if opened.origin else -1
        self._closed = False

    @classmethod
    def open(
        cls,
        collection: Collection,
        number: int,
        directory: Path,
        *,
        threads: ShardThreads,
        vectors: VectorOptions,
        use_snapshots: bool = True,
    ) -> "LocalShard":
        """
        Open the shard in *directory*: from its newest good snapshot, else empty. Blocks while it reads files.

        Its owner applies the ledger's operations after `applied_seq` to it. Damage is never an error.

        Raises:
            Conflict: Another process has it open, or its snapshots are of another number of shards.
            BackendFailed: The directory cannot be written.
        """
        try:
            claim = Claim(directory)
        except OSError as error:
            raise BackendFailed(f"Shard {number} cannot be opened in {directory}: {error}") from error
        try:
            opened = open_shard(collection, number, directory, vectors, use_snapshots=use_snapshots)
        except BaseException as error:
            claim.release()
            if isinstance(error, TercetError) or not isinstance(error, Exception):
                raise
            raise BackendFailed(f"Shard {number} cannot be opened in {directory}: {error}") from error
        return cls(opened, claim, threads, compact=vectors.compact)

    @property
    def number(self) -> int:
        """Which slice this is."""
        return self._contents.number

    @property
    def applied_seq(self) -> int:
        """The last operation of the collection that this shard has seen."""
        return self._contents.view.applied_seq

    @property
    def documents(self) -> int:
        """How many live documents it holds."""
        return len(self._contents.view.live)

    def standing(self) -> ShardStanding:
        """Return how it stands."""
        self._check_open()
        contents, parts = self._contents, self._contents.parts
        return ShardStanding(
            contents.number,
            contents.view.applied_seq,
            len(contents.view.live),
            rows=len(parts.vectors),
            segments=parts.vectors.segments(),
            memory_bytes=parts.vectors.memory_bytes + parts.lexical.memory_bytes + parts.ids.memory_bytes,
            disk_bytes=parts.vectors.disk_bytes + parts.lexical.disk_bytes + parts.store.disk_bytes,
            snapshot_seq=self._snapshot_seq,
        )

    async def apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        """
        Take *operations* and become true up to *applied_seq*; all become visible together, before this returns.

        Calls take effect one after the other. After a failure searches see none of the call, and it may be repeated.
        Cancelling does not undo a call that has begun.
        """
        await self._write("apply operations", lambda: self._contents.apply(operations, applied_seq))
        if not self._closed:
            self._start(self._turns.submit, self._shorten_log)

    async def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        """Return document count and frequencies as BM25 counts them: documents deleted lately may be among them."""
        self._check_open()
        # Microseconds for each term: quicker here than by way of another thread.
        return self._contents.view.statistics(terms)

    async def search(self, query: ShardQuery) -> ShardAnswer:
        """Return the best candidates of each retriever, as of one moment."""
        return await self._read(lambda: self._contents.view.search(query))

    async def fetch(self, ids: Sequence[str], *, vectors: bool = False) -> dict[str, ShardDocument]:
        """Return the live documents among *ids*, with their newest fields."""
        return await self._read(lambda: self._contents.fetch(ids, vectors=vectors))

    async def matching(self, filter: Any, *, limit: int) -> list[Match]:
        """Return up to *limit* live documents that match *filter*, the longest unchanged first."""
        return await self._read(lambda: self._contents.matching(filter, limit))

    @property
    def changed(self) -> bool:
        """Whether a snapshot would hold anything that the last one does not: operations, or what maintenance made of them."""
        contents = self._contents
        if contents.view.applied_seq == 0:
            return False
        return (contents.view.applied_seq, contents.generation) != (self._snapshot_seq, self._snapshot_generation)

    async def maintain(self, *, idle: bool) -> bool:
        """
        Do one piece of what is due (seal, merge, rebuild, fold); False when nothing was.

        Searches and writes go on meanwhile. Whatever it raises, the shard is as it was, and a later call tries again.

        Raises:
            GivenUp: The pace said so.
        """
        async with self._maintaining:
            # Both: while much is written there is always something to do for vectors.
            vectors, words = await self._maintain_vectors(idle), await self._maintain_lexical(idle)
            worked = vectors or words
            if worked:
                await self._write("remove old files", self._collect)
            return worked

    async def snapshot(self, epoch: str) -> int:
        """
        Write a snapshot of what is applied now, read while *epoch* was the ledger's, and return what it is true for.

        Writes wait only while the state is noted. When nothing has changed since the last one, that one stays.
        """
        async with self._snapshotting:
            contents = self._contents
            if not self.changed:
                return self._snapshot_seq
            path = await self._aside("begin a snapshot", self._snapshots.begin)
            frozen = await self._write("freeze its state", lambda: contents.freeze(path / "lexical"))
            await self._write("bring its store to the disk", contents.parts.store.checkpoint)
            await self._aside(
                "write a snapshot",
                lambda: self._snapshots.finish(path, contents.collection, contents.number, epoch, frozen),
            )
            self._snapshot_seq = frozen.view.applied_seq
            self._snapshot_generation = frozen.generation
        if not self._maintaining.locked():  # Otherwise files may be there that no index knows yet.
            async with self._maintaining:
                await self._write("remove old files", self._collect)
        return self._snapshot_seq

    async def audit(self, pages: AsyncIterator[Sequence[Operation]], *, repair: bool) -> AuditReport:
        """
        Compare the shard with the ledger and, with *repair*, mend it; it answers and follows meanwhile.

        *pages* are all operations of this slice from the first one on, read after this was called: `ledger_slice`.
        What is written meanwhile is no difference.
        """
        repaired = 0
        with self._contents.watching() as applied_since:
            audit = await self._write(
                "begin an audit", lambda: Audit(self._contents, applied_since, vectors=not self._compact)
            )
            async for page in pages:
                mends = await self._aside("compare a page", lambda page=page: audit.compare(page))  # type: ignore[misc]
                if repair and mends:
                    repaired += await self._write("mend", lambda mends=mends: audit.mend(mends))  # type: ignore[misc]
            surplus = await self._aside("look for what is too much", audit.surplus)
            if repair and surplus:
                repaired += await self._write("mend", lambda: audit.bury(surplus))
        view = self._contents.view
        return AuditReport(self.number, view.applied_seq, len(view.live), audit.differences, repaired)

    async def aclose(self) -> None:
        """Free what it holds; searches and writes under way finish first, building gives up at its next step."""
        if self._closed:
            return
        self._closed = True
        try:
            while self._working:
                await asyncio.wait([asyncio.wrap_future(future) for future in tuple(self._working)])
        finally:  # A caller who does not wait any longer leaves the files to be closed all the same.
            try:
                freed = self._turns.submit(self._free)
            except RuntimeError:
                self._free()
            else:
                await asyncio.shield(asyncio.wrap_future(freed))

    def _free(self) -> None:
        try:
            self._contents.parts.store.close()
        finally:
            self._claim.release()

    # --- maintenance

    async def _maintain_vectors(self, idle: bool) -> bool:
        contents, index = self._contents, self._contents.parts.vectors
        job, live = await self._write(
            "look for work", lambda: (index.due(contents.view.live, idle=idle), contents.view.live)
        )
        if job is None:
            return False
        built = await self._build(lambda: index.build(job, live, self._pace))
        await self._write("use new segments", lambda: contents.swap_vectors(job, built))
        return True

    async def _maintain_lexical(self, idle: bool) -> bool:
        contents, index = self._contents, self._contents.parts.lexical
        job, live = await self._write(
            "look for work", lambda: (index.due(contents.view.live, idle=idle), contents.view.live)
        )
        if job is None:
            return False
        built = await self._build(lambda: index.build(job, live, self._pace))
        await self._write("use new words", lambda: contents.swap_lexical(job, built))
        return True

    def _pace(self) -> None:
        if self._closed:
            raise GivenUp("the shard is closing")
        self._threads.pace()

    def _collect(self) -> None:
        self._contents.parts.vectors.collect(self._snapshots.needed_vector_files())

    def _shorten_log(self) -> None:
        try:
            self._contents.parts.store.checkpoint(full=False)
        except Exception as error:  # The log is longer, and that is all.
            _log.warning("store_log_not_shortened", shard=self.number, error=str(error))

    # --- threads

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady(f"Shard {self.number} is closed.")

    async def _read(self, work: Callable[[], T]) -> T:
        return await self._run("be read", self._threads.readers.submit, work)

    async def _write(self, what: str, work: Callable[[], T]) -> T:
        return await self._run(what, self._turns.submit, work)

    async def _aside(self, what: str, work: Callable[[], T]) -> T:
        return await self._run(what, self._threads.writers.submit, work)

    async def _build(self, work: Callable[[], T]) -> T:
        return await self._run("build segments", self._threads.maintenance.submit, work)

    def _start(self, submit: Callable[[Callable[[], T]], Future[T]], work: Callable[[], T]) -> Future[T]:
        """Begin *work*; a caller that gives up leaves it to finish, and aclose waits for it."""
        self._check_open()
        try:
            future = submit(work)
        except RuntimeError as error:
            raise NotReady(f"Shard {self.number} is closed.") from error
        self._working.add(future)
        future.add_done_callback(self._working.discard)
        return future

    async def _run(self, what: str, submit: Callable[[Callable[[], T]], Future[T]], work: Callable[[], T]) -> T:
        try:
            return await asyncio.wrap_future(self._start(submit, work))
        except (TercetError, GivenUp):
            raise
        except Exception as error:
            raise BackendFailed(f"Shard {self.number} could not {what}: {error}") from error
