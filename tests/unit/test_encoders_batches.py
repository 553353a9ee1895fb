"""Batches as arrays, and batches that a device's memory does not hold."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from services.common.encoders.batches import in_halves, padded, rounded_up
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
