"""One caller's submission under way, and the pieces of work that it shares with others who want the same."""

import asyncio
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from services.common.batching.queue import Entry, Flow, Lane

OutputT = TypeVar("OutputT")


class Job(Generic[OutputT]):
    """A submission under way; touched from the event loop only."""

    __slots__ = (
        "batch",
        "done",
        "entered_at",
        "inference_s",
        "lane",
        "outputs",
        "queue_s",
        "remaining",
        "tokenization_s",
        "works",
    )

    def __init__(self, size: int, lane: Lane, entered_at: float, done: "asyncio.Future[None]") -> None:
        self.outputs: list[OutputT | None] = [None] * size
        self.remaining = size
        self.lane = lane
        self.entered_at = entered_at
        self.done = done
        self.works: list[Work] = []
        self.batch: object = None  # The batch that it had an output from last: its time counts once.
        self.tokenization_s = 0.0
        self.queue_s = 0.0
        self.inference_s = 0.0

    def take(
        self, position: int, output: OutputT, batch: object, queued_at: float, started: float, seconds: float
    ) -> None:
        """Have the output for *position*, of a batch that took *seconds* from *started* on."""
        if self.done.done():
            return
        self.outputs[position] = output
        if self.batch is not batch:
            self.batch = batch
            self.inference_s += seconds
        self.queue_s = max(self.queue_s, started - max(queued_at, self.entered_at))
        self.remaining -= 1
        if not self.remaining:
            self.done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End in *error*, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


class Work(Entry):
    """
    One item under way for everybody who wants its output: tokenised once, computed once.

    *home* is the flow it waits in, once prepared. Its deadline is the latest that a waiter ever had; a waiter that
    leaves earlier is no longer counted in *wanted_by*.
    """

    __slots__ = ("home", "item", "key", "measured", "running", "settled", "unstarted_by", "waiters", "wanted_by")

    def __init__(self, item: Any, key: Hashable, home: Flow, unstarted_by: object) -> None:
        super().__init__(None, 0, 0.0)
        self.item = item
        self.key = key
        self.home = home
        self.unstarted_by: object = unstarted_by  # Who will prepare it; None once that began.
        self.measured = False  # Part of the measurement at warm-up.
        self.running = False
        self.settled = False
        self.waiters: list[tuple[Job[Any], int]] = []
        self.wanted_by = 0

    def attach(self, job: Job[Any], position: int, deadline_at: float) -> None:
        """Have *job* wait for the output at *position* too."""
        self.waiters.append((job, position))
        self.wanted_by += 1
        if deadline_at > self.deadline_at:
            self.deadline_at = deadline_at
        job.works.append(self)

    def let_go(self) -> None:
        """Keep nothing of it in memory."""
        self.settled = True
        self.item = self.prepared = None
        self.waiters = []
