"""Tokenisation: in the event loop where that is cheap, else in threads, a chunk at a time."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from services.common.batching.engine import Engine
from services.common.batching.submission import Job, Work
from services.common.errors import BackendFailed, NotReady

CHUNK_ITEMS = 128  # A tokenizer thread takes so much at a time, so that large submissions do not hold it for long.
CHUNK_SIZE = 65_536  # And so many characters, where the engine tells: some 10 ms of tokenisation.

Ready = Callable[[list[Work], Sequence[Any], Sequence[int], float], None]
Failed = Callable[[Sequence[Work], BaseException], None]


class Tokenizers:
    """
    The threads that prepare items.

    *ready* gets each chunk in the event loop: the works, what they were prepared to, the tokens of each, and the
    seconds it took, waiting included; *failed* gets those that could not be prepared. An item over CHUNK_SIZE goes
    alone, and to a thread of its own, so that nothing but another such item waits for it.
    """

    def __init__(self, engine: Engine[Any, Any, Any], threads: int, ready: Ready, failed: Failed) -> None:
        self.engine = engine
        self.ready = ready
        self.failed = failed
        self.size_of: Callable[[Any], int] = getattr(engine, "size", lambda _item: 0)
        self._is_quick: Callable[[Sequence[Any]], bool] = getattr(engine, "quick", lambda _items: False)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._oversize = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-oversize")

    def prepare(self, works: list[Work], job: Job[Any]) -> None:
        """Have *works*, which *job* brought, prepared: now if that is quick, else in the background."""
        items = [work.item for work in works]
        if not self._is_quick(items):
            Preparation(self, works, job).advance()
            return
        started = time.monotonic()
        for work in works:
            work.unstarted_by = None
        try:
            prepared = self._run(items)
            tokens = [self.engine.tokens(one) for one in prepared]
        except Exception as error:
            self.failed(works, error)
            return
        job.tokenization_s = time.monotonic() - started
        self.ready(works, prepared, tokens, job.tokenization_s)

    def start(self, items: list[Any], *, oversize: bool = False) -> "asyncio.Future[Sequence[Any]]":
        """Prepare *items* in a thread. Raises NotReady after `close`."""
        try:
            pool = self._oversize if oversize else self._pool
            return asyncio.get_running_loop().run_in_executor(pool, self._run, items)
        except RuntimeError:
            raise NotReady("The service is stopping") from None

    def _run(self, items: Sequence[Any]) -> Sequence[Any]:
        prepared = self.engine.prepare(items)
        if len(prepared) != len(items):
            raise BackendFailed(f"The tokenizer gave {len(prepared)} results for {len(items)} items")
        return prepared

    def close(self) -> None:
        """Take no more; chunks that wait for a thread are cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._oversize.shutdown(wait=False, cancel_futures=True)


class Preparation:
    """The works that one submission brought, on their way through the threads: one chunk at a time, in order."""

    __slots__ = ("_job", "_left", "_started", "_tokenizers")

    def __init__(self, tokenizers: Tokenizers, works: list[Work], job: Job[Any]) -> None:
        for work in works:
            work.unstarted_by = self
        self._tokenizers = tokenizers
        self._left = deque(works)
        self._job = job
        self._started = time.monotonic()

    def advance(self) -> None:
        """Start the next chunk, if anything that is still wanted is left."""
        chunk = self._next_chunk()
        if not chunk:
            return
        for work in chunk:
            work.unstarted_by = None
        oversize = len(chunk) == 1 and self._tokenizers.size_of(chunk[0].item) > CHUNK_SIZE
        try:
            future = self._tokenizers.start([work.item for work in chunk], oversize=oversize)
        except NotReady as error:
            self._tokenizers.failed([*chunk, *self._left], error)
            return
        future.add_done_callback(partial(self._finish, chunk, time.monotonic()))

    def _next_chunk(self) -> list[Work]:
        chunk: list[Work] = []
        total = 0
        while self._left and len(chunk) < CHUNK_ITEMS:
            work = self._left[0]
            if work.unstarted_by is self and work.wanted_by:
                total += self._tokenizers.size_of(work.item)
                if chunk and total > CHUNK_SIZE:
                    break
                chunk.append(work)
            self._left.popleft()
        return chunk

    def _finish(self, chunk: list[Work], started: float, future: "asyncio.Future[Sequence[Any]]") -> None:
        tokenizers = self._tokenizers
        self._job.tokenization_s = time.monotonic() - self._started
        try:
            prepared = future.result()
            tokens = [tokenizers.engine.tokens(one) for one in prepared]
        except asyncio.CancelledError:
            tokenizers.failed([*chunk, *self._left], NotReady("The service is stopping"))
        except Exception as error:
            self._isolate(chunk, error)
        else:
            tokenizers.ready(chunk, prepared, tokens, time.monotonic() - started)
            self.advance()

    def _isolate(self, chunk: list[Work], error: Exception) -> None:
        if len(chunk) > 1 and any(job is not self._job for work in chunk for job, _ in work.waiters):
            for work in chunk:  # Somebody else wants some of it: only the item at fault may fail them.
                Preparation(self._tokenizers, [work], self._job).advance()
        else:
            self._tokenizers.failed(chunk, error)
        # Not at once: the callers that failed leave first, and take what nobody else wants with them.
        asyncio.get_running_loop().call_soon(self.advance)
