"""What the use cases need from a model and from a vector cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.tokens import TokenPiece, Tokens, TruncationDirection

InputType = Literal["query", "document"]
TokenIds = tuple[int, ...]
Input = str | TokenIds  # A text, or token ids that are used as they are, special tokens included.


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """
    A model's identity. Two models with the same *fingerprint* give the same vectors, whatever machine runs them.

    *prompts* maps prompt names (`query` and `document` among them, where the model wants any) to the text that goes
    before an input, *default_prompt* the one of them for inputs of no stated type. *dimensions* are the sizes that
    vectors may be cut to (Matryoshka), smallest first, empty where the model declares none. *weights_bytes* is what the
    weights take in memory. *revision* is a content hash. *vocabulary_size* bounds token ids
    that callers send; 0 when the model does not say.
    """

    name: str
    fingerprint: str
    dim: int
    max_tokens: int
    prompts: Mapping[str, str]
    runtime: str
    precision: str
    precision_reason: str
    revision: str = ""
    pooling: str = "mean"
    dimensions: tuple[int, ...] = ()
    vocabulary_size: int = 0
    weights_bytes: int = 0
    device: str = "cpu"
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    default_prompt: str | None = None


class Backend(Protocol):
    """
    A loaded model. `forward`, `token_vectors` and `close` are called from one thread at a time, the rest from any.

    tests/contract/embedding_backend_contract.py is what every implementation inherits.
    """

    @property
    def info(self) -> ModelInfo:
        """What this is."""
        ...

    def tokenize(self, texts: Sequence[str], *, direction: TruncationDirection = "right") -> list[Tokens]:
        """Tokenise *texts*, in order, each cut to the model's limit: `right` keeps its beginning, `left` its end."""
        ...

    def pieces(self, text: str, *, add_special_tokens: bool = True) -> list[TokenPiece]:
        """Return every token of *text*, uncut, with the character offsets it covers."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text that *ids* stand for."""
        ...

    def forward(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """Return float32 vectors, shape [len(batch), dim], in order; texts of any lengths may be mixed."""
        ...

    def token_vectors(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """Return each text's token vectors, special tokens included: float32, shape [len(ids), width] each."""
        ...

    def close(self) -> None:
        """Give the model's memory back; nothing is called afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class CachedVector:
    """A raw vector as the model made it (not normalised, not cut), with what it cost."""

    vector: NDArray[np.float32]
    tokens: int
    truncated: bool


class VectorCache(Protocol):
    """
    Vectors by key. Losing entries, or the whole cache, is a miss and never an error.

    tests/contract/vector_cache_contract.py is what every implementation inherits.
    """

    async def get_many(self, keys: Sequence[bytes]) -> list[CachedVector | None]:
        """Return one entry a key, in order, None where there is none: one round trip for all of them."""
        ...

    def keep(self, key: bytes, entry: CachedVector) -> None:
        """Keep *entry* where that can be done at once; elsewhere nothing, and `put_many` follows."""
        ...

    async def put_many(self, entries: Mapping[bytes, CachedVector]) -> None:
        """Keep *entries*, in one round trip."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...
