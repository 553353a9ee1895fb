"""What the embedder needs from a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.tokens import Tokens


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """
    A model's identity. Two models with the same *fingerprint* give the same vectors, whatever machine runs them.

    *prompts* maps `query` and `document` to the text the model wants before an input of that type.
    """

    name: str
    fingerprint: str
    dim: int
    max_tokens: int
    prompts: Mapping[str, str]
    runtime: str
    precision: str
    precision_reason: str


class Backend(Protocol):
    """A loaded model. `tokenize` may be called from any thread; `forward` always is from the same one."""

    @property
    def info(self) -> ModelInfo:
        """What this is."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise *texts*, in order, each cut to the model's limit."""
        ...

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """Return float32 vectors, shape [len(batch), dim], in order; texts of any lengths may be mixed."""
        ...
