"""The embedded ledger: one SQLite file, one thread that writes, a few that read."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import apsw
import structlog

from services.common.errors import NotReady
from services.common.tracing import span
from services.search.ledger import rows
from services.search.ledger.connection import FileLock, connect, explain, migrate, sync_directory
from services.search.ledger.writer import Writer
from services.search.ports import Collection, CollectionState, KnownDocument, LedgerDocument, Operation

T = TypeVar("T")

READERS = 4

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    """What an open ledger holds: its lock, the writer's connection and the readers'."""

    lock: FileLock
    epoch: str
    writer: apsw.Connection
    readers: tuple[apsw.Connection, ...]

    def close(self) -> None:
        """Close the connections, the writer last (it then folds the WAL into the file), and give up the lock."""
        for connection in (*self.readers, self.writer):
            connection.close()
        self.lock.release()


def _open_file(path: Path) -> _File:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    opened: list[apsw.Connection] = []
    try:
        opened.append(connect(path))
        epoch = migrate(opened[0], path)
        sync_directory(path)
        opened.extend(connect(path, readonly=True) for _ in range(READERS))
    except BaseException:
        for connection in opened:
            connection.close()
        lock.release()
        raise
    return _File(lock, epoch, opened[0], tuple(opened[1:]))


class SqliteLedger:
    """
    The `Ledger` port over one SQLite file, which one process holds at a time.

    Every acknowledged write is synced to disk. Writes that wait together share a sync. Cancelling a write drops it or
    leaves it whole. Methods raise Unavailable where the disk is full, unwritable or failing, and Internal where the
    file is damaged; nothing is ever half written.
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
        self._closing: asyncio.Task[None] | None = None
        self._clearing: asyncio.Task[None] | None = None
        self._to_clear = False
        self._clear_dropped()

    @classmethod
    async def open(cls, path: Path) -> "SqliteLedger":
        """
        Open the ledger at *path*, creating it and its directory where there is none.

        Raises:
            Conflict: Another process holds it.
            NotReady: A newer Tercet wrote it.
            Unavailable: The file cannot be created, read or written.
            Internal: The file is damaged or is no ledger.
        """
        executor = ThreadPoolExecutor(1, thread_name_prefix="ledger-write")
        opening = executor.submit(_open_file, path)
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
        """Identity of this ledger's history, made with the file."""
        return self._file.epoch

    async def create_collection(self, collection: Collection) -> None:
        """Add *collection*. Raises Conflict when the name is taken."""
        await self._write("create", lambda connection: rows.create(connection, collection))

    async def list_collections(self) -> list[Collection]:
        """Return all collections, by name."""
        return await self._read("collections", rows.collections)

    async def find_collection(self, name: str) -> Collection | None:
        """Return the collection of that name, if there is one."""
        found = await self._read("collections", lambda connection: rows.collections(connection, name))
        return found[0] if found else None

    async def delete_collection(self, uuid: str) -> bool:
        """Remove a collection with all its documents at once; their space is freed in the background."""
        dropped = await self._write("drop", lambda connection: rows.drop(connection, uuid))
        if dropped:
            self._clear_dropped()
        return dropped

    async def append(self, uuid: str, upserts: Sequence[LedgerDocument]) -> int:
        """
        Store *upserts* in one transaction, an operation each, in order; return the last operation number.

        Raises:
            NotFound: The collection was deleted meanwhile.
            InvalidInput: A vector has not the collection's dimensions, or metadata cannot be written as JSON.
        """
        return await self._write("append", lambda connection: rows.append(connection, uuid, upserts))

    async def delete(self, uuid: str, ids: Sequence[str]) -> tuple[int, int]:
        """Delete those of *ids* that exist; return (how many, the last operation number). Raises NotFound."""
        return await self._write("delete", lambda connection: rows.delete(connection, uuid, ids))

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
        """Return the last operation number and the live count. Raises NotFound."""
        return await self._read("state", lambda connection: rows.state(connection, uuid))

    async def aclose(self) -> None:
        """Close the file; calls under way finish first, later ones raise NotReady. Closing twice does no harm."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._clearing is not None:
            self._clearing.cancel()
        await asyncio.to_thread(self._close_in_thread)

    def _close_in_thread(self) -> None:
        self._write_thread.shutdown(wait=True)
        self._read_threads.shutdown(wait=True)
        self._file.close()

    async def _write(self, operation: str, work: Callable[[apsw.Connection], T]) -> T:
        self._check_open()
        with span(f"ledger.{operation}"):
            return await self._writer.write(work)

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

    def _clear_dropped(self) -> None:
        self._to_clear = True
        if self._clearing is None or self._clearing.done():
            self._clearing = asyncio.create_task(self._clear_until_none())

    async def _clear_until_none(self) -> None:
        # A few rows per transaction, so that a large collection's removal never stands in the way of other writes.
        # What fails or is cut short is done at the next deletion or start.
        try:
            while self._to_clear:
                self._to_clear = False
                while await self._write("clear", rows.clear):
                    pass
        except Exception:
            _log.warning("ledger_clearing_failed", path=str(self._path), exc_info=True)


def _close_unwanted(opening: Future[_File]) -> None:
    """Close a file that was opened for someone who had gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
