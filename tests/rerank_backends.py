"""Scorers for the tests: the shipped fake one, made to have troubles or labels, or to wait."""

import os
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.common.errors import OutOfMemory
from services.rerank.backends.fake import FakeBackend
from services.rerank.ports import DocumentTokens, QueryTokens, ScorerInfo, Window

PATIENCE_S = 30.0
_WORDS = {int(FakeBackend().tokenize([word])[0].ids[0]): word for word in ("poison", "odd", "huge", "hang", "die")}


def words_of(window: Window) -> set[str]:
    """Return those of the words that mean trouble which *window* holds."""
    ids = list(window.query.ids)
    if window.document is not None:
        ids += list(window.document.ids[window.start : window.end])
    return {_WORDS[one] for one in ids if one in _WORDS}


class TroubledScorer(FakeBackend):
    """
    The fake scorer that cannot bear some words.

    `poison` makes it raise, `odd` give what is not a number, `huge` run out of memory and `die` end its process, whatever
    else is in the batch; `hang` makes it wait for `let_go`. *batches* has the windows of each batch that it began,
    *tokenized* the texts of each call of the tokenizer, which `untokenizable` makes raise.
    """

    def __init__(self, max_tokens: int = 256, **info: object) -> None:
        super().__init__(max_tokens)
        self._info = replace(self._info, **info)  # type: ignore[arg-type]
        self.let_go = threading.Event()
        self.hangs = threading.Event()
        self.batches: list[list[Window]] = []
        self.tokenized: list[list[str]] = []
        self.closed = False

    @property
    def scored(self) -> list[Window]:
        """All windows of all batches."""
        return [window for batch in self.batches for window in batch]

    def tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """See Backend."""
        self.tokenized.append(list(texts))
        if "untokenizable" in texts:
            raise ValueError("cannot")
        return super().tokenize(texts)

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend."""
        self.batches.append(list(batch))
        words = set().union(*map(words_of, batch))
        if "hang" in words:
            self.hangs.set()
            self.let_go.wait(PATIENCE_S)
        if "poison" in words:
            raise RuntimeError("cannot bear this text")
        if "huge" in words:
            raise OutOfMemory("the device is full")
        if "die" in words:
            os._exit(1)
        made = super().score(batch)
        for row, window in enumerate(batch):
            if "odd" in words_of(window):
                made[row] = np.nan
        return made

    def close(self) -> None:
        """Note it."""
        self.closed = True


class LabellingScorer(FakeBackend):
    """A classifier: the output of a label is how often its name is in the text; of two texts, in the second."""

    def __init__(self, *labels: str, max_tokens: int = 256) -> None:
        super().__init__(max_tokens)
        self._info = replace(self._info, name="labels", kind="classifier", labels=labels, ranks=False)
        self._ids = [int(super(LabellingScorer, self).tokenize([label])[0].ids[0]) for label in labels]

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return self._info

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend."""
        read = [
            window.query.ids if window.document is None else window.document.ids[window.start : window.end]
            for window in batch
        ]
        return np.array([[(ids == one).sum() for one in self._ids] for ids in read], dtype=np.float32)


class SharingScorer(TroubledScorer):
    """The fake scorer with token vectors to share: a document's are its words, and each is made once. See SharesVectors."""

    def __init__(self, max_tokens: int = 256) -> None:
        super().__init__(max_tokens)
        self.known: set[bytes] = set()
        self.made: list[tuple[bytes, bytes]] = []
        self.taken: list[tuple[bytes, bytes]] = []

    @staticmethod
    def _key(window: Window) -> bytes:
        assert window.document is not None
        return b"%s/%d-%d" % (window.document.key, window.start, window.end)

    def lacking(self, windows: Sequence[Window]) -> list[bytes]:
        """See SharesVectors."""
        return [key for key in dict.fromkeys(map(self._key, windows)) if key not in self.known]

    def take(self, key: bytes, value: bytes) -> None:
        """See SharesVectors."""
        self.taken.append((key, value))
        self.known.add(key)

    def fresh(self) -> list[tuple[bytes, bytes]]:
        """See SharesVectors."""
        made, self.made = self.made, []
        return made

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend."""
        for window in batch:
            if (key := self._key(window)) not in self.known:
                self.known.add(key)
                self.made.append((key, b"vectors of " + key))
        return super().score(batch)


def query_tokens(words: int) -> QueryTokens:
    """Return a query of so many tokens."""
    return FakeBackend(1 << 20).tokenize_query(" ".join(f"q{number}" for number in range(words)))
