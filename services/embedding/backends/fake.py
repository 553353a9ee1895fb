"""A deterministic model without weights, so that the whole stack starts in a second: texts that share words are near."""

import hashlib
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.tokens import TokenPiece, Tokens, TruncationDirection
from services.embedding.ports import ModelInfo

DIM = 64
MAX_TOKENS = 256
MAX_REMEMBERED = 100_000


class FakeBackend:
    """
    A text's vector is the sum of one pseudo-random vector a word, at unit length; word order does not count.

    There are no special tokens. A token's id is a checksum of the word, so `decode` knows the words that were read here.
    """

    def __init__(self) -> None:
        self._words: dict[int, str] = {}
        self._info = ModelInfo(
            name="fake",
            fingerprint=f"fake@1/{MAX_TOKENS}",
            dim=DIM,
            max_tokens=MAX_TOKENS,
            prompts={},
            runtime="numpy",
            precision="fp32",
            precision_reason="the only one there is",
            revision="1",
            vocabulary_size=2**32,
        )

    @property
    def info(self) -> ModelInfo:
        """What this is."""
        return self._info

    def tokenize(self, texts: Sequence[str], *, direction: TruncationDirection = "right") -> list[Tokens]:
        """Split on non-word characters; a token's id is a checksum of the lower-cased word."""
        tokenized = []
        for text in texts:
            words = re.findall(r"\w+", text.lower()) or [""]
            kept = words[:MAX_TOKENS] if direction == "right" else words[-MAX_TOKENS:]
            tokenized.append(Tokens([self._id(word) for word in kept], len(words) > MAX_TOKENS))
        return tokenized

    def _id(self, word: str) -> int:
        token = zlib.crc32(word.encode())
        if len(self._words) < MAX_REMEMBERED:
            self._words[token] = word
        return token

    def pieces(self, text: str, *, add_special_tokens: bool = True) -> list[TokenPiece]:
        """See Backend."""
        return [
            TokenPiece(self._id(found[0].lower()), found[0], False, found.start(), found.end())
            for found in re.finditer(r"\w+", text)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Backend; a word that was never read here is shown as its number."""
        return " ".join(self._words.get(token, f"<{token}>") for token in ids)

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Backend."""
        vectors = np.stack([np.sum([_word_vector(token) for token in item.ids], axis=0) for item in batch])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)

    def token_vectors(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """See Backend."""
        return [np.concatenate([self.forward([Tokens([token], False)]) for token in item.ids]) for item in batch]

    def close(self) -> None:
        """Nothing to give back."""


def _word_vector(token: int) -> NDArray[np.float64]:
    raw = hashlib.shake_128(token.to_bytes(4, "little")).digest(DIM)
    return np.frombuffer(raw, dtype=np.uint8).astype(np.float64) - 127.4
