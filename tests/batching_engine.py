"""A deterministic engine for the batcher's tests, and what they wait with."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from services.common.batching import Batcher, Lane
from services.common.deadline import NO_DEADLINE
from services.common.errors import InvalidInput

PATIENCE_S = 10.0
TokenBatcher = Batcher[str, str]


class Echo:
    """
    Answers each text in upper case; a text is as many tokens as it has characters.

    While *gate* is closed, `run` waits. Texts that begin with `bad` raise, `die` kills the worker, `refuse` cannot be prepared.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.batches: list[list[str]] = []
        self.queued: list[str] = []  # Counted in the same step of the event loop that queues them.

    def prepare(self, items: Sequence[str]) -> Sequence[str]:
        if any(item.startswith("refuse") for item in items):
            raise InvalidInput("query is too long", param="query")
        return list(items)

    def tokens(self, prepared: str) -> int:
        self.queued.append(prepared)
        return len(prepared)

    def run(self, batch: Sequence[str]) -> Sequence[str]:
        self.batches.append(list(batch))
        self.running.set()
        assert self.gate.wait(PATIENCE_S)
        if any(item.startswith("die") for item in batch):
            raise SystemExit(1)
        if any(item.startswith("bad") for item in batch):
            raise ValueError("cannot")
        return [item.upper() for item in batch]

    @property
    def seen(self) -> list[str]:
        return [item for batch in self.batches for item in batch]


@asynccontextmanager
async def running(engine: Echo, **options) -> AsyncIterator[TokenBatcher]:
    """Run a batcher over *engine*; at the end the gate is opened and it is closed."""
    batcher: TokenBatcher = Batcher(engine, **options)
    await batcher.start()
    try:
        yield batcher
    finally:
        engine.gate.set()
        await batcher.aclose()


def texts(count: int, name: str = "item") -> list[str]:
    """Return *count* different texts of mixed lengths."""
    return [f"{name}-{number}" + "x" * (number * 7 % 23) for number in range(count)]


async def until(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds, for a bounded time."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def occupy(batcher: TokenBatcher, engine: Echo) -> "asyncio.Task[object]":
    """Have the worker busy with a batch until the gate opens."""
    engine.gate.clear()
    engine.running.clear()
    task = asyncio.create_task(batcher.submit(["busy"], lane=Lane.QUERY, deadline=NO_DEADLINE))
    await asyncio.to_thread(engine.running.wait, PATIENCE_S)
    return task
