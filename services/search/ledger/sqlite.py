"""The embedded ledger: one SQLite file, one thread that writes, a few that read."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import apsw
import structlog

from services.common.errors import NotReady
from services.common.tracing import span
from services.search.claim import Claim
from services.search.ledger import catalogue, epochs, rows
from services.search.ledger.clearing import Clearing
from services.search.ledger.connection import connect, explain, sync_directory
from services.search.ledger.schema import migrate
from services.search.ledger.writer import Writer
from services.search.ports import (
    Collection,
    CollectionState,
    KnownDocument,
    LedgerDocument,
    Operation,
    Receipt,
    Written,
)

T = TypeVar("T")

READERS = 4

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    """What an open ledger holds: its claim, the writer's connection and the readers'."""

    claim: Claim
    epoch: str
    writer: apsw.Connection
    readers: tuple[apsw.Connection, ...]
    seqs: dict[str, int]

    def close(self) -> None:
        """Close the connections, the writer last (it then folds the WAL into the file), and give up the claim."""
        _close_all((*self.readers, self.writer))
        self.claim.release()


def _open_file(path: Path, vfs: str | None) -> _File:
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = Claim(path, what="ledger")
    opened: list[apsw.Connection] = []
    try:
        opened.append(connect(path, vfs=vfs))
        migrate(opened[0], path)
        epoch = epochs.begin(opened[0])
        sync_directory(path)
        opened.extend(connect(path, readonly=True, vfs=vfs) for _ in range(READERS))
        seqs = catalogue.positions(opened[0])
    except BaseException:
        _close_all(opened)
        claim.release()
        raise
    return _File(claim, epoch, opened[0], tuple(opened[1:]), seqs)


def _close_all(connections: Iterable[apsw.Connection]) -> None:
    for connection in connections:
        try:
            connection.close()
        except apsw.Error:  # Folding the log into the file failed: what was committed is safe in the log.
            _log.warning("ledger_not_folded", exc_info=True)


class SqliteLedger:
    """
    The `Ledger` port over one SQLite file, which one process holds at a time.

    Every acknowledged write is synced to disk. Writes that wait together share a sync. Cancelling a write drops it or
    leaves it whole. Methods raise Unavailable where the disk is full, unwritable or failing, and Internal where the
    file is damaged; nothing is ever half written. A write that failed while it was being synced is not seen by this
    process, and may be found whole when the file is opened again, as after a crash.
    """

    def __init__(self, path: Path, file: _File, executor: ThreadPoolExecutor) -> None:
        """Serve *file*; `open` is the way to make one."""
        self._path = path
        self._file = file
        self._write_thread = executor
        self._writer = Writer(file.writer, path, executor)
        self._read_threads = ThreadPoolExecutor(len(file.readers), thread_name_prefix="ledger-read")
        self._free: SimpleQueue[apsw.Connection] = SimpleQueue()
        for connection in file.readers:
            self._free.put(connection)
        self._seqs = file.seqs
        self._ending = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._clearing = Clearing(str(path), lambda: self._write("clear", catalogue.clear))
        self._clearing.ask()

    @classmethod
    async def open(cls, path: Path, *, vfs: str | None = None) -> "SqliteLedger":
        """
        Open the ledger at *path*, creating it and its directory where there is none; this begins another epoch.

        *vfs* names a registered SQLite VFS through which the file is read and written, if not SQLite's own.

        Raises:
            Conflict: Another process holds it.
            NotReady: A newer Tercet wrote it.
            Unavailable: The file cannot be created, read or written.
            Internal: The file is damaged or is no ledger.
        """
        executor = ThreadPoolExecutor(1, thread_name_prefix="ledger-write")
        opening = executor.submit(_open_file, path, vfs)
        try:
            file = await asyncio.wrap_future(opening)
        except BaseException as error:
            opening.add_done_callback(_close_unwanted)
            executor.shutdown(wait=False)
            if isinstance(error, Exception):
                raise explain(error, path) from error
            raise
        return cls(path, file, executor)

    @property
    def epoch(self) -> str:
        """A token of the stretch of history that began when this file was opened."""
        return self._file.epoch

    @property
    def exclusive(self) -> bool:
        """True: the file is claimed by this process alone."""
        return True

    async def shares_history(self, uuid: str, epoch: str, seq: int) -> bool:
        """Whether operations up to *seq*, read in *epoch*, are in this file; False beyond the last 1,000 openings."""
        return await self._read(
            "shares_history", lambda connection: epochs.shares_history(connection, uuid, epoch, seq)
        )

    async def create_collection(self, collection: Collection) -> None:
        """Add *collection*. Raises Conflict when the name is taken, by a collection or by an alias."""
        await self._write("create", lambda connection: catalogue.create(connection, collection))

    async def list_collections(self) -> list[Collection]:
        """Return all collections, by name."""
        return await self._read("collections", catalogue.collections)

    async def find_collection(self, name: str) -> Collection | None:
        """Return the collection of that name, or the one that the alias of that name means, if there is one."""
        return await self._read("collections", lambda connection: catalogue.find(connection, name))

    async def delete_collection(self, uuid: str) -> bool:
        """Remove a collection with its aliases and documents at once; their space is freed in the background."""
        dropped = await self._write(
            "drop", lambda connection: catalogue.drop(connection, uuid), lambda _: self._seqs.pop(uuid, None)
        )
        if dropped:
            self._clearing.ask()
        return dropped

    async def list_aliases(self) -> dict[str, str]:
        """Return all aliases, by name, each with the name of its collection."""
        return await self._read("aliases", catalogue.aliases)

    async def set_aliases(self, changes: Mapping[str, str | None]) -> None:
        """Let each alias mean the collection named, or nothing for None, at once. Raises NotFound or Conflict."""
        await self._write("set_aliases", lambda connection: catalogue.set_aliases(connection, changes))

    async def append(
        self,
        uuid: str,
        upserts: Sequence[LedgerDocument],
        *,
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        """
        Store *upserts* (distinct ids) in one transaction, an operation each, in order.

        A document in *expected* is stored only while it stands at that operation; otherwise it is reported.

        Raises:
            NotFound: The collection was deleted meanwhile.
            InvalidInput: A vector has not the collection's dimensions, metadata cannot be written as JSON, or an id
                comes twice.
            Conflict: There is a receipt under that key already; nothing was done.
        """
        return await self._write(
            "append",
            lambda connection: rows.append(connection, uuid, upserts, expected or {}, receipt),
            lambda written: self._hear(uuid, written),
        )

    async def delete(
        self,
        uuid: str,
        ids: Sequence[str],
        *,
        expected: Mapping[str, int] | None = None,
        receipt: Receipt | None = None,
    ) -> Written:
        """Delete those of *ids* that exist; `changed` says how many. Otherwise as `append`."""
        return await self._write(
            "delete",
            lambda connection: rows.delete(connection, uuid, ids, expected or {}, receipt),
            lambda written: self._hear(uuid, written),
        )

    async def find_receipt(self, uuid: str, key: str) -> Receipt | None:
        """Return what was kept under an idempotency key, for at least a day after its write."""
        return await self._read("find_receipt", lambda connection: rows.find_receipt(connection, uuid, key))

    async def known(self, uuid: str, ids: Sequence[str]) -> dict[str, KnownDocument]:
        """Return what is held for those of *ids* that are live."""
        return await self._read("known", lambda connection: rows.known(connection, uuid, ids))

    async def documents(self, uuid: str, ids: Sequence[str]) -> dict[str, LedgerDocument]:
        """Return the live documents among *ids*."""
        return await self._read("documents", lambda connection: rows.documents(connection, uuid, ids))

    async def operations_after(self, uuid: str, seq: int, *, limit: int) -> list[Operation]:
        """Return up to *limit* operations numbered above *seq*, in order; none for a collection that is gone."""
        return await self._read(
            "operations_after", lambda connection: rows.operations_after(connection, uuid, seq, limit)
        )

    async def state(self, uuid: str) -> CollectionState:
        """Return where the collection stands. Raises NotFound."""
        return await self._read("state", lambda connection: catalogue.state(connection, uuid))

    def heard_seq(self, uuid: str) -> int:
        """Return the last operation number of a collection, exactly; 0 where there is none."""
        return self._seqs.get(uuid, 0)

    def heard_collections(self) -> AbstractSet[str]:
        """Return the uuids of the collections that there are."""
        return self._seqs.keys()

    async def wait_for_news(self, timeout_s: float) -> None:
        """Return when *timeout_s* is over or the ledger closes: no other process can write here."""
        self._check_open()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ending.wait()
        except TimeoutError:
            return

    async def trim(self, uuid: str, seq: int) -> int:
        """Forget deletions numbered up to *seq*, some at a time, and old receipts; return how many deletions."""
        forgotten = 0
        while some := await self._write("trim", lambda connection: rows.trim(connection, uuid, seq)):
            forgotten += some
        return forgotten

    async def aclose(self) -> None:
        """Close the file; calls under way finish first, later ones raise NotReady. Closing twice does no harm."""
        if self._closing is None:
            self._ending.set()
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._clearing.aclose()
        await asyncio.to_thread(self._close_in_thread)

    def _close_in_thread(self) -> None:
        self._write_thread.shutdown(wait=True)
        self._read_threads.shutdown(wait=True)
        self._file.close()

    def _hear(self, uuid: str, written: Written) -> None:
        self._seqs[uuid] = written.seq

    async def _write(
        self, operation: str, work: Callable[[apsw.Connection], T], then: Callable[[T], object] = lambda _: None
    ) -> T:
        self._check_open()
        with span(f"ledger.{operation}"):
            return await self._writer.write(work, then)

    async def _read(self, operation: str, work: Callable[[apsw.Connection], T]) -> T:
        self._check_open()
        with span(f"ledger.{operation}"):
            return await asyncio.wrap_future(self._read_threads.submit(self._read_in_thread, work))

    def _read_in_thread(self, work: Callable[[apsw.Connection], T]) -> T:
        connection = self._free.get()
        try:
            connection.execute("BEGIN")  # so that all statements of a call see the same moment
            return work(connection)
        except Exception as error:
            raise explain(error, self._path) from error
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._free.put(connection)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise NotReady(f"The ledger {self._path} is closed: the service is shutting down")


def _close_unwanted(opening: Future[_File]) -> None:
    """Close a file that was opened for someone who had gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
