"""The threads that all shards of a process share, and how the writes of one shard take turns in them."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from services.search.shards.vectors import use_one_thread

T = TypeVar("T")


def search_threads(count: int) -> ThreadPoolExecutor:
    """Return a pool for the searches of all of a process's shards: one query, one thread."""
    return ThreadPoolExecutor(count, thread_name_prefix="search", initializer=use_one_thread)


@dataclass(frozen=True, slots=True)
class ShardThreads:
    """
    What shards run their work in; none has a thread of its own, and none closes these.

    *maintenance* builds segments; *pace* is called by it all the time and sleeps as its share of the CPU demands.
    """

    readers: ThreadPoolExecutor
    writers: ThreadPoolExecutor
    maintenance: ThreadPoolExecutor
    pace: Callable[[], None]


class Turns:
    """Runs what it is given one after the other, in the order it came, in the threads of a pool."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running = False
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Let *work* run in its turn. Raises RuntimeError where the pool has been shut down."""
        future: Future[T] = Future()
        with self._lock:
            if not self._running:
                self._pool.submit(self._run)
                self._running = True
            self._waiting.append((work, future))
        return future

    def _run(self) -> None:
        """Run one piece of work, and leave the next to the pool, so that other shards have their turn."""
        with self._lock:
            work, future = self._waiting.popleft()
        if future.set_running_or_notify_cancel():
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        with self._lock:
            self._running = bool(self._waiting)
            if self._running:
                try:
                    self._pool.submit(self._run)
                except RuntimeError as error:
                    self._running = False
                    while self._waiting:
                        self._waiting.popleft()[1].set_exception(error)
