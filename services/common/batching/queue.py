"""What waits for the model, by lane, and which of it goes into the next batch. Pure data: the batcher holds the lock."""

import itertools
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Lane(StrEnum):
    """The two classes of work: somebody waits for a `query`; `bulk` is background."""

    QUERY = "query"
    BULK = "bulk"


class Ticket:
    """One caller's submission, as the queue sees it: whether it still wants its results."""

    __slots__ = ("abandoned", "deadline_at")

    def __init__(self, deadline_at: float) -> None:
        self.deadline_at = deadline_at
        self.abandoned = False

    def wanted(self, now: float) -> bool:
        """Whether somebody still waits at *now*."""
        return not self.abandoned and self.deadline_at > now


@dataclass(slots=True)
class Entry:
    """One prepared item: its place in the submission, its length in tokens, and when it was queued."""

    ticket: Any
    position: int
    prepared: Any
    tokens: int
    queued_at: float = field(default_factory=time.monotonic)


class LaneQueues:
    """
    First in, first out by lane, batches packed by length.

    A batch always holds the oldest entry of its lane, with those of the next *sort_window* entries that are nearest to
    it in length, as far as `entries × longest ≤ max_batch_tokens`: little padding, and nobody waits for ever.
    Bulk gets every *bulk_turn*-th batch while queries wait; otherwise queries go first.
    """

    def __init__(self, *, max_batch_tokens: int, max_batch_items: int, sort_window: int, bulk_turn: int = 4) -> None:
        self._queues: dict[Lane, deque[Entry]] = {lane: deque() for lane in Lane}
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_items = max_batch_items
        self._sort_window = sort_window
        self._bulk_turn = bulk_turn
        self._query_batches_in_a_row = 0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def depth(self, lane: Lane) -> int:
        """Return how many entries wait in *lane*."""
        return len(self._queues[lane])

    def extend(self, lane: Lane, entries: Iterable[Entry]) -> None:
        """Add *entries* at the end of *lane*."""
        self._queues[lane].extend(entries)

    def drop(self, ticket: Ticket) -> int:
        """Remove what *ticket* still has waiting; return how much that was."""
        before = len(self)
        for lane, queue in self._queues.items():
            if any(entry.ticket is ticket for entry in queue):
                self._queues[lane] = deque(entry for entry in queue if entry.ticket is not ticket)
        return before - len(self)

    def clear(self) -> list[Entry]:
        """Remove and return everything."""
        entries = [entry for queue in self._queues.values() for entry in queue]
        for queue in self._queues.values():
            queue.clear()
        return entries

    def next_batch(self, *, bulk_budget_tokens: int) -> tuple[Lane, list[Entry]]:
        """
        Remove and return the next batch, shortest entry first; empty when nothing that is still wanted waits.

        A bulk batch stays within *bulk_budget_tokens*, though never less than one entry.
        """
        now = time.monotonic()
        lane = self._next_lane()
        queue = self._queues[lane]
        while queue and not queue[0].ticket.wanted(now):
            queue.popleft()
        # Tickets are abandoned in another thread: even the first may be by now.
        window = [entry for entry in itertools.islice(queue, self._sort_window) if entry.ticket.wanted(now)]
        if not window:
            return lane, []
        budget = self._max_batch_tokens if lane is Lane.QUERY else min(self._max_batch_tokens, bulk_budget_tokens)
        batch = self._around_oldest(window, budget)
        taken = {id(entry) for entry in batch}
        rest = [entry for entry in itertools.islice(queue, self._sort_window) if id(entry) not in taken]
        for _ in range(min(self._sort_window, len(queue))):
            queue.popleft()
        queue.extendleft(reversed(rest))
        return lane, batch

    def _next_lane(self) -> Lane:
        query, bulk = self._queues[Lane.QUERY], self._queues[Lane.BULK]
        if query and (not bulk or self._query_batches_in_a_row < self._bulk_turn):
            self._query_batches_in_a_row += 1
            return Lane.QUERY
        self._query_batches_in_a_row = 0
        return Lane.BULK

    def _around_oldest(self, window: list[Entry], budget_tokens: int) -> list[Entry]:
        """Grow a run of the length-sorted *window* from its oldest entry, always towards the nearer neighbour."""
        oldest = window[0]
        ordered = sorted(window, key=lambda entry: entry.tokens)
        low = high = next(index for index, entry in enumerate(ordered) if entry is oldest)
        while high - low + 1 < min(self._max_batch_items, len(ordered)):
            size = high - low + 2
            up = ordered[high + 1] if high + 1 < len(ordered) else None
            down = ordered[low - 1] if low > 0 else None
            up_fits = up is not None and up.tokens * size <= budget_tokens
            down_fits = down is not None and ordered[high].tokens * size <= budget_tokens
            if up_fits and down_fits:
                assert up is not None
                assert down is not None
                up_fits = up.tokens - oldest.tokens <= oldest.tokens - down.tokens
            if up_fits:
                high += 1
            elif down_fits:
                low -= 1
            else:
                break
        return ordered[low : high + 1]
