"""Which of the entries that may go next make a batch with little padding. Pure functions."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar


class Sized(Protocol):
    """Anything with a length in tokens."""

    @property
    def tokens(self) -> int:
        """Its length."""
        ...


SizedT = TypeVar("SizedT", bound=Sized)
Fits = Callable[[int, int], bool]  # (items, longest tokens) -> whether a batch may be that.


def pack(head: SizedT, window: Sequence[SizedT], *, max_items: int, fits: Fits) -> list[SizedT]:
    """
    Return a batch out of *window*, shortest entry first: *head*, with the entries that are nearest to it in length.

    It is a run of the length-sorted window, grown from *head* always towards the nearer neighbour that fits.
    *head* is in the batch even if it does not fit.
    """
    ordered = sorted(window, key=attrgetter("tokens"))
    last = len(ordered) - 1
    if last < max_items and fits(last + 1, ordered[last].tokens):
        return ordered
    low = high = ordered.index(head)
    middle = head.tokens
    for size in range(2, min(max_items, last + 1) + 1):
        up_fits = high < last and fits(size, ordered[high + 1].tokens)
        down_fits = low > 0 and fits(size, ordered[high].tokens)
        if up_fits and down_fits:
            up_fits = ordered[high + 1].tokens - middle <= middle - ordered[low - 1].tokens
        if up_fits:
            high += 1
        elif down_fits:
            low -= 1
        else:
            break
    return ordered[low : high + 1]


def allot(waiting: Sequence[int], places: int) -> list[int]:
    """
    Share *places* out among those who have so much *waiting* each, in the order of their turns.

    Each gets an equal share, at least one place while there are any; what some leave over goes to the first who have more.
    """
    share = max(1, places // max(1, len(waiting)))
    allotted = []
    for count in waiting:
        allotted.append(min(count, share, places))
        places -= allotted[-1]
    for index, count in enumerate(waiting):
        if places <= 0:
            break
        more = min(count - allotted[index], places)
        allotted[index] += more
        places -= more
    return allotted
