"""Any sentence-transformers model through torch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.encoder import Encoder, Precision
from services.common.tokens import Tokens
from services.embedding.ports import ModelInfo


class TransformerBackend:
    """Loads *name* when it is made (seconds) and keeps it."""

    def __init__(self, name: str, *, revision: str | None, precision: Precision, device: str) -> None:
        self._encoder = Encoder(name, revision=revision, precision=precision, device=device)
        self._info = ModelInfo(
            name=name,
            fingerprint=f"{name.rsplit('/', 1)[-1]}@{self._encoder.digest[:16]}/{self._encoder.max_tokens}",
            dim=self._encoder.dim,
            max_tokens=self._encoder.max_tokens,
            prompts=self._encoder.prompts,
            runtime=f"torch ({self._encoder.device})",
            precision=self._encoder.precision,
            precision_reason=self._encoder.precision_reason,
        )

    @property
    def info(self) -> ModelInfo:
        """What this is."""
        return self._info

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """See Backend."""
        return self._encoder.tokenize(texts)

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Backend."""
        return self._encoder.pooled(batch)
