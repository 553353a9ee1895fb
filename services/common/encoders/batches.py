"""Batches of token ids as arrays, and what is done when a device's memory does not hold one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from services.common.errors import OutOfMemory
from services.common.tokens import Tokens

ItemT = TypeVar("ItemT")
OutputT = TypeVar("OutputT")


def longest_of(batch: Sequence[Tokens]) -> int:
    """Return the length in tokens of the longest text of *batch*, 1 at least."""
    return max(1, *(len(item.ids) for item in batch))


def padded(
    batch: Sequence[Tokens], pad_id: int, *, shape: tuple[int, int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    Return the ids and the attention mask of *batch*, int64, shape [len(batch), longest], padded on the right.

    Padding on the right is right for decoder-only models too: no token sees what follows it, positions count from 0.
    A larger *shape* has more padding. Rows beyond the batch and texts without tokens have one token of padding that
    counts, for attention to nothing is not a number.
    """
    rows, longest = shape or (len(batch), longest_of(batch))
    ids = np.full((rows, longest), pad_id, dtype=np.int64)
    mask = np.zeros((rows, longest), dtype=np.int64)
    mask[:, 0] = 1
    for row, item in enumerate(batch):
        ids[row, : len(item.ids)] = item.ids
        mask[row, : len(item.ids)] = 1
    return ids, mask


def rounded_up(size: int) -> int:
    """
    Return the least of 1 to 16, then of multiples of 2 to 64, 4 to 256, 8 to 1,024 and so on, that is at least *size*.

    Less than a sixteenth more, and few enough that a runtime which prepares itself for each shape meets each soon.
    """
    step = 1
    while size > 16 * step * step:
        step *= 2
    return -(-size // step) * step


def divided(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """
    Return the positions of texts of these *lengths* in one to *parts* groups, longest texts first.

    The largest group, padded to its longest text, is as small as it can be with groups of neighbours in length.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    sizes = [max(1, lengths[position]) for position in order]
    if not sizes:
        return [[]]
    low, high = sizes[0], sizes[0] * len(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_ends(sizes, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    ends = _ends(sizes, low)
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _ends(sizes: Sequence[int], padded_size: int) -> list[int]:
    """Return where groups of falling *sizes* end that are filled, one after the other, up to *padded_size* each."""
    ends = [0]
    while ends[-1] < len(sizes):
        ends.append(min(len(sizes), ends[-1] + padded_size // sizes[ends[-1]]))
    return ends[1:]


def in_halves(
    run: Callable[[Sequence[ItemT]], list[OutputT]],
    batch: Sequence[ItemT],
    *,
    is_out_of_memory: Callable[[BaseException], bool],
    free: Callable[[], None],
) -> list[OutputT]:
    """
    Return *run* of *batch*; where the device's memory does not hold it, of its halves, down to single items.

    *free* gives back what the failed attempt left behind.

    Raises:
        OutOfMemory: A single item is too much.
    """
    try:
        return run(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise OutOfMemory(
                "the device's memory does not hold even one text; try again later, or lower the model's max_tokens"
            ) from error
    # Outside the handler: while the error is handled its traceback keeps the failed attempt's tensors alive.
    free()
    middle = len(batch) // 2
    first = in_halves(run, batch[:middle], is_out_of_memory=is_out_of_memory, free=free)
    return first + in_halves(run, batch[middle:], is_out_of_memory=is_out_of_memory, free=free)
