"""Any sentence-transformers or transformers model, by whichever runtime computes it fastest here."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.encoders import EncoderOptions, fingerprint_of, open_encoder
from services.common.tokens import TokenPiece, Tokens, TruncationDirection
from services.embedding.ports import ModelInfo


class TransformerBackend:
    """
    Loads *name* when it is made (seconds) and keeps it; *served_name* is what callers know it by.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """

    def __init__(self, name: str, options: EncoderOptions, *, served_name: str | None = None) -> None:
        self._encoder = open_encoder(name, options)
        description = self._encoder.description
        self._info = ModelInfo(
            name=served_name or name,
            fingerprint=fingerprint_of(self._encoder, name),
            dim=description.dim,
            max_tokens=description.max_tokens,
            prompts=description.prompts,
            runtime=f"{self._encoder.runtime} ({self._encoder.device})",
            precision=self._encoder.precision,
            precision_reason=self._encoder.reason,
            revision=description.digest,
            pooling=description.pooling,
            dimensions=description.dimensions,
            vocabulary_size=description.vocabulary_size,
            weights_bytes=self._encoder.weights_bytes,
            device=self._encoder.device,
            measured=self._encoder.measured,
            default_prompt=description.default_prompt,
        )

    @property
    def info(self) -> ModelInfo:
        """What this is."""
        return self._info

    def tokenize(self, texts: Sequence[str], *, direction: TruncationDirection = "right") -> list[Tokens]:
        """See Backend."""
        return self._encoder.tokenize(texts, direction=direction)

    def pieces(self, text: str, *, add_special_tokens: bool = True) -> list[TokenPiece]:
        """See Backend."""
        return self._encoder.tokenizer.pieces(text, add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Backend."""
        return self._encoder.tokenizer.decode(ids, skip_special_tokens)

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Backend."""
        return self._encoder.pooled(batch)

    def token_vectors(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """See Backend."""
        return self._encoder.per_token(batch)

    def close(self) -> None:
        """See Backend."""
        self._encoder.close()
