"""A deterministic scorer without weights: the share of the query's words that the document has."""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.rerank.ports import DocumentTokens, QueryTokens, ScorerInfo, Window, text_key

_WORD = re.compile(r"\w+")


class FakeBackend:
    """Needs no model and scores in microseconds; a token is a word, without regard to case. See Backend."""

    def __init__(self, max_tokens: int = 256) -> None:
        self._info = ScorerInfo(
            name="fake",
            kind="fake",
            score="share of the query's words that occur in the document",
            fingerprint="fake-rerank@1",
            max_tokens=max_tokens,
            runtime="python",
            precision="fp32",
        )

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return self._info

    def tokenize_query(self, text: str) -> QueryTokens:
        """See Backend."""
        most = self._info.max_tokens // 2
        key, ids, _ = _read(text)
        return QueryTokens(key, ids[:most], len(ids) > most)

    def tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """See Backend."""
        return [_read(text) for text in texts]

    def room(self, query: QueryTokens) -> int:
        """See Backend."""
        return self._info.max_tokens - len(query.ids)

    def tokens(self, window: Window) -> int:
        """See Backend."""
        return len(window.query.ids) + window.end - window.start

    def cost_tokens(self, window: Window) -> int:
        """See Backend; nothing is for nothing."""
        return max(1, self.tokens(window))

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """See Backend."""
        return np.array([[_share(window)] for window in batch], dtype=np.float32)

    def relevance(self, output: NDArray[np.float32]) -> float:
        """See Backend."""
        return float(output[0])

    def to_probability(self, raw: float) -> float:
        """The share is one already."""
        return raw

    def close(self) -> None:
        """Nothing to give back."""


def _read(text: str) -> DocumentTokens:
    words = list(_WORD.finditer(text))
    ids = [zlib.crc32(word.group().lower().encode()) >> 1 for word in words]
    offsets = [word.span() for word in words]
    return DocumentTokens(text_key(text), np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2))


def _share(window: Window) -> float:
    query = set(window.query.ids.tolist())
    there = set() if window.document is None else set(window.document.ids[window.start : window.end].tolist())
    return len(query & there) / max(1, len(query))
