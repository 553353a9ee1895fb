"""One thread that writes: changes that wait together share a transaction, and so one sync to disk."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import apsw

from services.common.errors import TercetError
from services.search.ledger.connection import explain

T = TypeVar("T")

MAX_GROUP = 64


@dataclass(slots=True)
class _Change:
    """Work that waits for its turn, and how it went inside the transaction."""

    work: Callable[[apsw.Connection], Any]
    future: Future[Any] = field(default_factory=Future)
    result: Any = None
    error: TercetError | None = None


class Writer:
    """
    Runs changes in the order they come, in one thread, on one connection.

    Up to `MAX_GROUP` changes that wait at the same time become one transaction. Each has a savepoint of its own: one
    that raises leaves no trace and does not touch the others. No change is answered before its transaction is on disk.
    """

    def __init__(self, connection: apsw.Connection, path: Path, executor: ThreadPoolExecutor) -> None:
        """Write through *connection* in the single thread of *executor*; *path* is for messages."""
        self._connection = connection
        self._path = path
        self._executor = executor
        self._waiting: deque[_Change] = deque()

    async def write(self, work: Callable[[apsw.Connection], T]) -> T:
        """
        Run *work* in a transaction and return its result once that is synced to disk.

        Cancelling drops it if it has not begun; otherwise it is finished all the same. Raises what *work* raises.
        """
        change = _Change(work)
        self._waiting.append(change)
        self._executor.submit(self._commit_waiting)
        result: T = await asyncio.wrap_future(change.future)
        return result

    def _commit_waiting(self) -> None:
        group: list[_Change] = []
        while self._waiting and len(group) < MAX_GROUP:
            change = self._waiting.popleft()
            if change.future.set_running_or_notify_cancel():
                group.append(change)
        if not group:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for change in group:
                self._attempt(change)
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._undo()
            for change in group:
                change.future.set_exception(change.error or explain(error, self._path))
            return
        for change in group:
            if change.error is None:
                change.future.set_result(change.result)
            else:
                change.future.set_exception(change.error)

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
