"""Texts on which a runtime or precision is compared with fp32, and how near two sets of vectors are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.common.tokens import Tokens

MIN_COSINE = 0.999
# Longer texts tell no more of a precision, and would take a large model minutes at fp32.
LONGEST_GOLDEN_TOKENS = 2048

_ENGLISH = "The quick brown fox jumps over the lazy dog, and then it does so again, for the dog has not moved at all. "
_MIXED = "Naïve café, 東京, Москва, العربية, हिन्दी, 🙂 and 12,345.67 €; "
SHORT_GOLDEN_TEXTS = (
    "A short question?",
    "one",
    "Naïve café, 東京, Москва, 12,345.67 € — punctuation; and symbols: <tag> {json: true} #hash",
    "Wie lange dauert die Lieferung nach Österreich, und was kostet sie?",
)
GOLDEN_TEXTS = (
    *SHORT_GOLDEN_TEXTS,
    "",
    "東京は日本の首都であり、世界最大級の都市のひとつである。",
    "Москва — столица России, город федерального значения.",
    "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها.",
    "दिल्ली भारत की राजधानी है और एक बड़ा शहर है।",
    "def add(a: int, b: int) -> int:\n    return a + b  # tabs\tand\r\nnew lines",
    "[CLS] special [SEP] tokens </s> <s> in a text <|endoftext|>",
    _ENGLISH * 2,
    _MIXED * 3,
    _ENGLISH * 6,
    _MIXED * 20,
    "word " * 6000,
)


class Agreement(NamedTuple):
    """The cosines of vectors to those they should equal."""

    least: float
    mean: float


def agreement(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> Agreement:
    """Compare *vectors* with *expected*, both of shape [n, dim], row by row; vectors that are not finite agree as 0."""
    left, right = vectors.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.nan_to_num(np.sum(left * right, axis=1) / lengths, nan=0.0)
    return Agreement(float(cosines.min()), float(cosines.mean()))


def golden_batches(tokens: Sequence[Tokens], *, max_batch_tokens: int = 4096) -> list[list[Tokens]]:
    """Return *tokens*, each at most LONGEST_GOLDEN_TOKENS long, in batches of similar lengths, shortest first."""
    cut = [Tokens(item.ids[:LONGEST_GOLDEN_TOKENS], item.truncated) for item in tokens]
    batches: list[list[Tokens]] = []
    for item in sorted(cut, key=lambda each: len(each.ids)):
        if not batches or (len(batches[-1]) + 1) * len(item.ids) > max_batch_tokens:
            batches.append([])
        batches[-1].append(item)
    return batches
