"""Which of the entries that may go next make a batch that ends in time, where a full one would not. Pure functions."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

from services.common.batching.packing import Fits, Sized


class Timed(Sized, Protocol):
    """Anything with a length in tokens that is wanted until some moment."""

    @property
    def deadline_at(self) -> float:
        """That moment, infinite when it is wanted for ever."""
        ...


TimedT = TypeVar("TimedT", bound=Timed)
Predict = Callable[[int, int], float]  # (items, longest tokens) -> the seconds that such a batch should take.

SLACK = 1.2  # A batch is planned to end when it takes so many times what is predicted: an output that is late is worth nothing.
# A batch takes at most this share of the time that its middle entry has left, so that whoever comes while it runs can still be
# served; the next batch makes up for a wrong prediction …
SHARE_OF_TIME = 1 / 3
# … but no fewer than so many entries' worth of time: what a batch costs beside them would weigh too much.
LEAST_ALONE = 4.0
# An entry is left for another batch where it would add more than so many times its share of one of its own length: padding.
WORTH_JOINING = 1.1


def is_late(entries: Sequence[Timed], seconds: float, now: float) -> bool:
    """Say whether a batch of *seconds* that starts *now* may end after the deadline of any of *entries*."""
    return min(entry.deadline_at for entry in entries) < now + SLACK * seconds


def in_time(
    entries: Sequence[TimedT], now: float, *, most_s: float, predict: Predict, fits: Fits, max_items: int
) -> list[TimedT]:
    """
    Return a batch out of *entries*, which are in the order of their turns, that should end in time for all of it.

    It holds the first ones that have the time, and takes up to *most_s*, or less: see SHARE_OF_TIME. Those that would
    be late at its end are in it only where others leave room. When each would be late even alone, the one with most time
    left goes alone: the prediction may be wrong. Shortest entry first, never empty.
    """
    left_s = {entry: (entry.deadline_at - now) / SLACK for entry in entries}
    possible = [entry for entry in entries if predict(1, entry.tokens) <= left_s[entry]]
    if not possible:
        return [max(entries, key=attrgetter("deadline_at"))]
    middle_s = sorted(left_s[entry] for entry in possible)[len(possible) // 2]
    limit_s = min(most_s, max(SHARE_OF_TIME * middle_s, LEAST_ALONE * predict(1, possible[0].tokens)))
    batch: list[TimedT] = []
    longest, spent_s, end_s = 0, 0.0, limit_s
    for entry in sorted(possible, key=lambda entry: left_s[entry] < limit_s):  # It keeps their order otherwise.
        items, length = len(batch) + 1, max(longest, entry.tokens)
        seconds, due_s = predict(items, length), min(end_s, left_s[entry])
        if batch:
            if items > max_items or predict(items, longest) > end_s:
                break
            if seconds > due_s or not fits(items, length):
                continue
            if seconds - spent_s > WORTH_JOINING * predict(items, entry.tokens) / items:
                continue
        batch.append(entry)
        longest, spent_s, end_s = length, seconds, due_s
    return sorted(batch, key=attrgetter("tokens"))
