"""
What waits for the model, by lane, and which of it goes into the next batch. Pure data: the batcher holds the lock.

Inside a lane callers take turns by deficit round robin (M. Shreedhar and G. Varghese, "Efficient Fair Queuing using
Deficit Round Robin", SIGCOMM 1995): each visit gives a caller a quantum of tokens, and every entry it gets served is paid for
with its tokens. Unlike in the paper a batch may overdraw an account, and is paid back in later rounds; entries that
fill another caller's batch are paid for too. A caller's submissions take turns one batch each.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from itertools import islice, zip_longest
from operator import itemgetter
from typing import Any

from services.common.batching.packing import Fits, allot, pack
from services.common.batching.urgency import Predict, in_time, is_late

# Where not all can be done in time, the batch is looked for among so many: enough for a crowd to be in view.
URGENT_WINDOW = 256


class Lane(StrEnum):
    """The two classes of work: somebody waits for a `query`; `bulk` is background."""

    QUERY = "query"
    BULK = "bulk"


class Entry:
    """One prepared item: its length in tokens, the moment nobody wants it any more, and when it was queued."""

    __slots__ = ("deadline_at", "flow", "prepared", "queued_at", "tokens")

    def __init__(self, prepared: Any, tokens: int, deadline_at: float = float("inf")) -> None:
        self.prepared = prepared
        self.tokens = tokens
        self.deadline_at = deadline_at
        self.queued_at = 0.0
        self.flow: Flow | None = None  # Where it waits; None before and after.


class Flow:
    """The entries of one submission that wait, first in, first out, and how many have gone into batches."""

    __slots__ = ("caller", "entries", "lane", "served", "tokens", "waiting")

    def __init__(self, lane: Lane, caller: str) -> None:
        self.lane = lane
        self.caller = caller
        self.entries: deque[Entry] = deque()  # Those that left stay until they come to the front, or are most of it.
        self.waiting = 0
        self.tokens = 0
        self.served = 0

    def add(self, entry: Entry) -> None:
        entry.flow = self
        self.entries.append(entry)
        self.waiting += 1
        self.tokens += entry.tokens

    def remove(self, entry: Entry) -> None:
        entry.flow = None
        self.waiting -= 1
        self.tokens -= entry.tokens
        entries = self.entries
        while entries and entries[0].flow is not self:
            entries.popleft()
        if len(entries) > 2 * self.waiting + 64:
            self.entries = deque(entry for entry in entries if entry.flow is self)

    def first(self, count: int) -> Iterable[Entry]:
        if self.waiting == len(self.entries):
            return islice(self.entries, count)
        return islice((entry for entry in self.entries if entry.flow is self), count)


class _Caller:
    """One caller's submissions in a lane, in the order of their turns, and the tokens it may still have served."""

    __slots__ = ("deficit", "flows", "name", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.flows: OrderedDict[Flow, None] = OrderedDict()
        self.waiting = 0
        self.deficit = 0

    def first(self, count: int) -> list[Entry]:
        if len(self.flows) >= count:
            return [flow.entries[0] for flow in islice(self.flows, count)]
        shares = allot([flow.waiting for flow in self.flows], count)
        return [entry for flow, share in zip(self.flows, shares, strict=True) for entry in flow.first(share)]


class _LaneQueue:
    """One lane: callers in the order of their turns, and what waits in all."""

    __slots__ = ("_debt_limit", "_least", "_quantum", "callers", "square_tokens", "tokens", "waiting")

    def __init__(self, max_batch_tokens: int) -> None:
        self.callers: OrderedDict[str, _Caller] = OrderedDict()
        self.waiting = 0
        self.tokens = 0
        self.square_tokens = 0
        # A full batch costs four rounds; so a caller with short batches heads at most four before the next one's turn.
        self._quantum = max(4, max_batch_tokens // 4)
        self._least = -(-self._quantum // 4)
        self._debt_limit = max_batch_tokens

    def add(self, flow: Flow, entry: Entry) -> None:
        caller = self.callers.get(flow.caller)
        if caller is None:
            caller = self.callers[flow.caller] = _Caller(flow.caller)
        caller.flows.setdefault(flow)
        caller.waiting += 1
        flow.add(entry)
        self._count(entry, 1)

    def remove(self, flow: Flow, entry: Entry) -> _Caller:
        caller = self.callers[flow.caller]
        flow.remove(entry)
        caller.waiting -= 1
        self._count(entry, -1)
        if not flow.waiting:
            del caller.flows[flow]
        if not caller.waiting:
            del self.callers[caller.name]
        return caller

    def _count(self, entry: Entry, sign: int) -> None:
        self.waiting += sign
        self.tokens += sign * entry.tokens
        self.square_tokens += sign * entry.tokens * entry.tokens

    def turn(self) -> _Caller:
        """Return the caller whose turn it is; it stays at the front until its tokens are spent."""
        callers = self.callers
        if len(callers) == 1:
            return next(iter(callers.values()))
        visits = 0
        while True:
            caller = next(iter(callers.values()))
            if caller.deficit <= 0:
                caller.deficit += self._quantum
            if caller.deficit > 0:
                return caller
            callers.move_to_end(caller.name)
            visits += 1
            if visits == len(callers):  # All are in debt: at once the rounds in which nobody would have a turn.
                rounds = min(-one.deficit for one in callers.values()) // self._quantum
                for one in callers.values():
                    one.deficit += rounds * self._quantum

    def window(self, caller: _Caller, places: int) -> list[Entry]:
        """
        Return up to *places* entries of all callers, each an equal share; the head of *caller*'s turn is the first.

        Callers deep in debt wait for their own turn: so what a caller may owe is bounded.
        """
        if len(self.callers) == 1:
            return caller.first(places)
        others = islice((one for one in self.callers.values() if one.deficit > -self._debt_limit), places)
        callers = [caller, *(one for one in others if one is not caller)]
        if len(callers) >= places:
            return [entry for one in callers[:places] for entry in one.first(1)]
        shares = allot([one.waiting for one in callers], places)
        return [entry for one, share in zip(callers, shares, strict=True) for entry in one.first(share)]

    def by_turns(self, window: list[Entry]) -> list[Entry]:
        """
        Return *window*, its first still first: callers alternate, who has paid least first, and a caller's submissions
        follow each other by how few of their entries have gone into batches.
        """
        had: dict[Flow, int] = {}
        callers: dict[str, list[tuple[int, Entry]]] = {}
        for position, entry in enumerate(window):
            flow = entry.flow
            assert flow is not None
            before = had.get(flow, flow.served)
            had[flow] = before + 1
            callers.setdefault(flow.caller, []).append((before if position else -1, entry))
        head, *others = callers
        order = [head, *sorted(others, key=lambda name: -self.callers[name].deficit)]
        ranked = [sorted(callers[name], key=itemgetter(0)) for name in order]
        return [each[1] for turn in zip_longest(*ranked) for each in turn if each is not None]

    def take(self, head: _Caller, head_flow: Flow, batch: list[Entry]) -> None:
        """Remove *batch* and have it paid for; *head* pays a quarter of a quantum at least, and its turn passes on."""
        alone = len(self.callers) == 1
        before = head.deficit
        for entry in batch:
            assert entry.flow is not None
            entry.flow.served += 1
            self.remove(entry.flow, entry).deficit -= entry.tokens
        head.deficit = min(head.deficit, before - self._least)
        if alone:
            head.deficit = max(head.deficit, -self._quantum)
        if head.waiting and head.deficit <= 0:
            self.callers.move_to_end(head.name)
        if head_flow.waiting:
            head.flows.move_to_end(head_flow)

    def tokens_before(self, caller: str, tokens: int) -> int:
        """Return about how many tokens are served before a new submission of *tokens* tokens is, turns considered."""
        own = self.callers.get(caller)
        mine = sum(min(flow.tokens, tokens) for flow in own.flows) if own else 0
        others = (other for other in self.callers.values() if other is not own)
        return mine + sum(min(sum(flow.tokens for flow in other.flows), mine + tokens) for other in others)


class LaneQueues:
    """
    Callers take turns inside a lane, and batches are packed by length.

    A batch holds the head of the turn, with those of up to *sort_window* entries, shared out equally among
    callers and their submissions, that are nearest to it in length, as far as `entries × longest ≤ max_batch_tokens`:
    little padding, and nobody waits for ever. A caller that joins *n* others heads one of the next 4 × (n + 1) batches
    of its lane. Bulk gets the batch after every *bulk_turn* of queries while queries wait; otherwise queries go first.

    Where such a batch should end too late for anything that it is chosen from, not all can be done in time: then it is
    one that should end in time for all in it (see `in_time`), the head of the turn if that can be, then of submissions
    that had least. So time goes to what can still be used, and each gets some of it.

    Adding, removing and moving an entry take constant time, a batch takes time in proportion to *sort_window*, and to
    URGENT_WINDOW where not all can be done in time.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_batch_items: int,
        sort_window: int,
        bulk_turn: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lanes: dict[Lane, _LaneQueue] = {lane: _LaneQueue(max_batch_tokens) for lane in Lane}
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_items = max_batch_items
        self._sort_window = sort_window
        self._bulk_turn = bulk_turn
        self._query_batches_in_a_row = 0

    def __len__(self) -> int:
        return sum(queue.waiting for queue in self._lanes.values())

    def depth(self, lane: Lane) -> int:
        """Return how many entries wait in *lane*."""
        return self._lanes[lane].waiting

    def load(self, lane: Lane) -> tuple[int, int, int]:
        """Return what waits in *lane*: entries, the sum of their tokens, and the sum of their tokens' squares."""
        queue = self._lanes[lane]
        return queue.waiting, queue.tokens, queue.square_tokens

    def tokens_before(self, lane: Lane, caller: str, tokens: int) -> int:
        """Return about how many tokens of *lane* go before a new submission of *caller* with *tokens* tokens is done."""
        return self._lanes[lane].tokens_before(caller, tokens)

    def add(self, flow: Flow, entry: Entry) -> None:
        """Add *entry* at the end of *flow*, which waits in its lane from now on."""
        entry.queued_at = self._clock()
        self._lanes[flow.lane].add(flow, entry)

    def remove(self, entry: Entry) -> bool:
        """Take *entry* out; return whether it waited."""
        flow = entry.flow
        if flow is None:
            return False
        self._lanes[flow.lane].remove(flow, entry)
        return True

    def clear(self) -> list[Entry]:
        """Remove and return everything, in the order of the turns."""
        entries = [
            entry
            for queue in self._lanes.values()
            for caller in queue.callers.values()
            for flow in caller.flows
            for entry in flow.first(flow.waiting)
        ]
        for entry in entries:
            self.remove(entry)
        return entries

    def next_batch(
        self, *, max_tokens: int | None = None, bulk_fits: Fits | None = None, predict: Predict | None = None
    ) -> tuple[Lane, list[Entry]]:
        """
        Remove and return the next batch, shortest entry first; empty when nothing that is still wanted waits.

        It stays within *max_tokens*, and a bulk batch within what *bulk_fits* allows, though never less than one entry.
        Without *predict*, which tells how long a batch should take, only what has expired is left out.
        """
        now = self._clock()
        lane = self._next_lane()
        queue = self._lanes[lane]
        budget = self._max_batch_tokens if max_tokens is None else min(self._max_batch_tokens, max_tokens)
        bounded = bulk_fits if lane is Lane.BULK else None

        def fits(items: int, longest: int) -> bool:
            return items * longest <= budget and (bounded is None or bounded(items, longest))

        while queue.waiting:
            caller = queue.turn()
            window = queue.window(caller, self._sort_window)
            if self._drop_expired(window, now):
                continue
            head = window[0]
            head_flow = head.flow
            assert head_flow is not None
            batch = pack(head, window, max_items=self._max_batch_items, fits=fits)
            most_s = 0.0 if predict is None else predict(len(batch), batch[-1].tokens)
            if predict is not None and is_late(window, most_s, now):
                window = queue.window(caller, URGENT_WINDOW)
                if self._drop_expired(window, now):
                    continue
                turns, most = queue.by_turns(window), self._max_batch_items
                batch = in_time(turns, now, most_s=most_s, predict=predict, fits=fits, max_items=most)
            queue.take(caller, head_flow, batch)
            return lane, batch
        return lane, []

    def _drop_expired(self, window: list[Entry], now: float) -> bool:
        """Remove those of *window* that nobody wants any more; return whether there were any."""
        expired = [entry for entry in window if entry.deadline_at <= now]
        for entry in expired:
            self.remove(entry)
        return bool(expired)

    def _next_lane(self) -> Lane:
        query, bulk = self._lanes[Lane.QUERY].waiting, self._lanes[Lane.BULK].waiting
        if query and (not bulk or self._query_batches_in_a_row < self._bulk_turn):
            self._query_batches_in_a_row += 1
            return Lane.QUERY
        self._query_batches_in_a_row = 0
        return Lane.BULK
