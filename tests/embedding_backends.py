"""Backends for the tests: the shipped fake one, made to have troubles, a price, or a size."""

import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.common.errors import OutOfMemory
from services.common.tokens import Tokens
from services.embedding.backends.fake import FakeBackend
from services.embedding.ports import ModelInfo


def _id(word: str) -> int:
    return zlib.crc32(word.encode())


class TroubledBackend(FakeBackend):
    """
    The fake model that cannot bear some words.

    `poison` makes it raise and `huge` run out of memory, whatever else is in the batch; `hang` makes it wait for `let_go`.
    *batches* has the number of texts in each batch that it began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.hangs = threading.Event()
        self.batches: list[int] = []
        self.closed = False

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Backend."""
        self.batches.append(len(batch))
        words = {token for tokens in batch for token in tokens.ids}
        if _id("hang") in words:
            self.hangs.set()
            self.let_go.wait(30)
        if _id("poison") in words:
            raise RuntimeError("cannot bear this text")
        if _id("huge") in words:
            raise OutOfMemory("the device is full")
        return super().forward(batch)

    def close(self) -> None:
        """Note it."""
        self.closed = True


class PricedBackend(FakeBackend):
    """The fake model on a device that takes *batch_s* for any batch and *token_s* for each token."""

    def __init__(self, device: str, *, batch_s: float, token_s: float) -> None:
        super().__init__()
        self._info = replace(self._info, device=device)
        self._batch_s, self._token_s = batch_s, token_s
        self.batches: list[int] = []

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Backend."""
        self.batches.append(len(batch))
        time.sleep(self._batch_s + self._token_s * sum(len(tokens.ids) for tokens in batch))
        return super().forward(batch)


class SizedBackend(FakeBackend):
    """The fake model under another identity."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self._info: ModelInfo = replace(self._info, **changes)  # type: ignore[arg-type]
        self.closed = False

    def close(self) -> None:
        """Note it."""
        self.closed = True
