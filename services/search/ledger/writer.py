"""One thread that writes: changes that wait together share a transaction, and so one sync to disk."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import apsw
import structlog

from services.common.errors import TercetError
from services.search.ledger.connection import explain

T = TypeVar("T")

_log = structlog.get_logger(__name__)

MAX_GROUP = 64
MAX_GROUP_S = 0.05
CHECKPOINT_BYTES = 16 * 2**20


@dataclass(slots=True)
class _Change:
    """Work that waits for its turn, and how it went inside the transaction."""

    work: Callable[[apsw.Connection], Any]
    then: Callable[[Any], object]
    future: Future[Any] = field(default_factory=Future)
    result: Any = None
    error: TercetError | None = None


class Writer:
    """
    Runs changes in the order they come, in one thread, on one connection.

    Up to `MAX_GROUP` changes that wait at the same time become one transaction, unless the first ones take longer than
    `MAX_GROUP_S`. Each has a savepoint of its own: one
    that raises leaves no trace and does not touch the others. No change is answered before its transaction is on disk. Once
    the write-ahead log has `CHECKPOINT_BYTES` it is folded into the file, after the answers.
    """

    def __init__(self, connection: apsw.Connection, path: Path, executor: ThreadPoolExecutor) -> None:
        """Write through *connection* in the single thread of *executor*; *path* is for messages."""
        self._connection = connection
        self._path = path
        self._executor = executor
        self._waiting: deque[_Change] = deque()
        self._page_bytes = int(connection.pragma("page_size"))
        self._log_bytes = 0
        connection.set_wal_hook(self._note_log)  # This also ends SQLite's own checkpoints, which delay a COMMIT.

    async def write(self, work: Callable[[apsw.Connection], T], then: Callable[[T], object]) -> T:
        """
        Run *work* in a transaction and return its result once that is synced to disk.

        *then* is called with the result before that, in the writer's thread, also when nobody waits any more.
        Cancelling drops it if it has not begun; otherwise it is finished all the same. Raises what *work* raises.
        """
        change = _Change(work, then)
        self._waiting.append(change)
        self._executor.submit(self._commit_waiting)
        result: T = await asyncio.wrap_future(change.future)
        return result

    def _commit_waiting(self) -> None:
        change = self._take()
        if change is None:
            return
        group = [change]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            group_until = time.monotonic() + MAX_GROUP_S
            self._attempt(change)
            while len(group) < MAX_GROUP and time.monotonic() < group_until and (change := self._take()):
                group.append(change)
                self._attempt(change)
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._undo()
            for change in group:
                change.future.set_exception(change.error or explain(error, self._path))
            return
        for change in group:
            if change.error is None:
                change.then(change.result)
                change.future.set_result(change.result)
            else:
                change.future.set_exception(change.error)
        if self._log_bytes >= CHECKPOINT_BYTES:
            self._checkpoint()

    def _note_log(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_bytes = pages * self._page_bytes
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        try:
            self._connection.wal_checkpoint()
        except apsw.Error:  # All that was committed is safe in the log; the next commit tries again.
            _log.warning("ledger_checkpoint_failed", path=str(self._path), exc_info=True)

    def _take(self) -> _Change | None:
        while self._waiting:
            change = self._waiting.popleft()
            if change.future.set_running_or_notify_cancel():
                return change
        return None

    def _attempt(self, change: _Change) -> None:
        self._connection.execute("SAVEPOINT change")
        try:
            change.result = change.work(self._connection)
        except Exception as error:
            if not self._connection.in_transaction:  # SQLite gave the whole transaction up, as it may on a full disk
                raise
            self._connection.execute("ROLLBACK TO change")
            change.error = explain(error, self._path)
        self._connection.execute("RELEASE change")

    def _undo(self) -> None:
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except apsw.Error:  # the transaction is over either way: a failed ROLLBACK has ended it
                return
