"""A deterministic model without weights, so that the whole stack starts in a second: texts that share words are near."""

import hashlib
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.tokens import Tokens
from services.embedding.ports import ModelInfo

DIM = 64
MAX_TOKENS = 256


class FakeBackend:
    """A text's vector is the sum of one pseudo-random vector a word, at unit length; word order does not count."""

    def __init__(self) -> None:
        self._info = ModelInfo(
            name="fake",
            fingerprint=f"fake@1/{MAX_TOKENS}",
            dim=DIM,
            max_tokens=MAX_TOKENS,
            prompts={},
            runtime="numpy",
            precision="fp32",
            precision_reason="the only one there is",
        )

    @property
    def info(self) -> ModelInfo:
        """What this is."""
        return self._info

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Split on non-word characters; a token's id is a checksum of the lower-cased word."""
        words = [re.findall(r"\w+", text.lower()) or [""] for text in texts]
        return [
            Tokens([zlib.crc32(word.encode()) for word in each[:MAX_TOKENS]], len(each) > MAX_TOKENS) for each in words
        ]

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Backend."""
        vectors = np.stack([np.sum([_word_vector(token) for token in item.ids], axis=0) for item in batch])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def _word_vector(token: int) -> NDArray[np.float64]:
    raw = hashlib.shake_128(token.to_bytes(4, "little")).digest(DIM)
    return np.frombuffer(raw, dtype=np.uint8).astype(np.float64) - 127.4
