"""Batches as arrays, and batches that a device's memory does not hold."""

from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.common.encoders.batches import divided, in_halves, padded, rounded_up
from services.common.encoders.torch_encoder import is_out_of_memory
from services.common.errors import OutOfMemory
from services.common.tokens import Tokens


def test_padding_is_on_the_right_with_the_models_own_id() -> None:
    """Ids and mask are int64; what is no token has the padding id and mask 0."""
    ids, mask = padded([Tokens([5, 6, 7], False), Tokens([8], False)], 3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (ids.dtype, mask.dtype) == (np.int64, np.int64)


def test_a_larger_shape_attends_to_something_everywhere() -> None:
    """Rows beyond the batch, and texts without tokens, have one token, so that no attention is over nothing."""
    ids, mask = padded([Tokens([5, 6], False), Tokens([], False)], 3, shape=(3, 4))
    assert ids.tolist() == [[5, 6, 3, 3], [3, 3, 3, 3], [3, 3, 3, 3]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert padded([Tokens([], False)], 3)[1].tolist() == [[1]]


def test_sizes_are_rounded_up_by_a_sixteenth_at_most() -> None:
    """A thousand sizes become 184, none more than a sixteenth larger, and a rounded one stays."""
    rounded = {size: rounded_up(size) for size in range(1, 1025)}
    assert all(size <= up < size * 17 / 16 for size, up in rounded.items())
    assert len(set(rounded.values())) == 184
    assert all(rounded_up(up) == up for up in rounded.values())


@pytest.mark.parametrize(
    ("lengths", "parts", "groups"),
    [
        ([], 2, [[]]),
        ([7], 4, [[0]]),
        ([5, 5, 5, 5], 2, [[0, 1], [2, 3]]),
        ([4, 100, 3, 5], 2, [[1], [3, 0, 2]]),
        ([8, 8, 8], 8, [[0], [1], [2]]),
        ([0, 0], 2, [[0], [1]]),
    ],
)
def test_a_batch_is_divided_by_its_padded_size(lengths: list[int], parts: int, groups: list[list[int]]) -> None:
    """The longest come first, and the largest part, padding included, is as small as it can be."""
    assert divided(lengths, parts) == groups


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(1, 5))
def test_no_other_division_has_a_smaller_largest_part(lengths: list[int], parts: int) -> None:
    """Every position is there once; of all ways to cut the sorted lengths none has less in its largest part."""
    groups = divided(lengths, parts)
    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))
    assert 1 <= len(groups) <= parts
    sizes = sorted((max(1, length) for length in lengths), reverse=True)

    def largest(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(sizes)]
        return max((sizes[start] * (end - start) for start, end in pairwise(bounds) if end > start), default=0)

    best = min(largest(cuts) for cuts in combinations_with_replacement(range(len(sizes) + 1), parts - 1))
    found = max((max(1, *(lengths[p] for p in group)) * len(group) for group in groups if group), default=0)
    assert found == best


class SmallDevice:
    """Doubles numbers, at most *room* at once, and fails as torch does beyond."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.ran: list[int] = []
        self.freed = 0

    def run(self, batch: Sequence[int]) -> list[int]:
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.ran.append(len(batch))
        return [2 * item for item in batch]

    def free(self) -> None:
        self.freed += 1

    def work(self, batch: Sequence[int]) -> list[int]:
        return in_halves(self.run, batch, is_out_of_memory=is_out_of_memory, free=self.free)


@pytest.mark.parametrize("room", [1, 2, 3, 7, 13, 20])
def test_a_batch_that_does_not_fit_is_halved(room: int) -> None:
    """Whatever fits at once, every item is computed exactly once, in order, and memory is freed before each retry."""
    device = SmallDevice(room)
    assert device.work(range(13)) == [2 * item for item in range(13)]
    assert sum(device.ran) == 13
    assert max(device.ran) <= room
    assert (device.freed > 0) == (room < 13)


def test_one_item_that_does_not_fit_is_out_of_memory() -> None:
    """Then, and only then, the caller is told, with an error that says to try again."""
    with pytest.raises(OutOfMemory) as caught:
        SmallDevice(0).work(range(4))
    assert caught.value.retryable


def test_other_failures_are_not_retried() -> None:
    """Only torch's ways to say that memory is full start halving."""
    ran = []

    def run(batch):
        ran.append(batch)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(run, [1, 2], is_out_of_memory=is_out_of_memory, free=lambda: None)
    assert len(ran) == 1
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (allocated: 1 GB)"))
    assert not is_out_of_memory(ValueError("out of memory"))
