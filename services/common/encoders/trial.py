"""What the candidates for computing a model are held to and timed on: of any kind of model, and of text encoders."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.golden import (
    GOLDEN_TEXTS,
    MIN_COSINE,
    SHORT_GOLDEN_TEXTS,
    Agreement,
    agreement,
    golden_batches,
)
from services.common.encoders.protocol import Encoder
from services.common.tokens import Tokens

_BATCH_ITEMS, _BATCH_TOKENS, _SHORT_TOKENS = 8, 130, 10
_GPU_BATCH_ITEMS = 64


class Computes(Protocol):
    """A model as a candidate computes it."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, `cuda`, `mps`."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


ModelT = TypeVar("ModelT", bound=Computes)
ModelT_contra = TypeVar("ModelT_contra", bound=Computes, contravariant=True)


class Verdict(NamedTuple):
    """How near a candidate is to fp32: *figures* by name, *nearness* to compare candidates by, and both in words."""

    figures: Mapping[str, float]
    nearness: float
    passes: bool
    words: str
    bound: str


class Trial(Protocol[ModelT_contra]):
    """
    Samples, what fp32 makes of them, and work to time.

    *golden* is fp32's output for the few short samples that later starts compare with, float32 [samples, outputs];
    *least_nearness* is the bound that `nearness` is to reach; *unit* is what a sample is, as in `batch_texts_per_s`.
    """

    @property
    def unit(self) -> str:
        """`text` or `pair`."""
        ...

    @property
    def golden(self) -> NDArray[np.float32]:
        """See the class."""
        ...

    @property
    def least_nearness(self) -> float:
        """See the class."""
        ...

    def judge(self, model: ModelT_contra | None) -> Verdict:
        """Hold *model* against fp32 on all samples; None is fp32 itself."""
        ...

    def nearness(self, model: ModelT_contra) -> float:
        """Compare what *model* makes of the short samples with `golden`; 1 is equality."""
        ...

    def batch(self, model: ModelT_contra) -> int:
        """Compute a batch of samples of usual length, and return how many they were."""
        ...

    def short(self, model: ModelT_contra) -> None:
        """Compute one short sample."""
        ...


def batch_items(device: str) -> int:
    """Return of how many samples a batch consists that is timed on *device*."""
    return _BATCH_ITEMS if device == "cpu" else _GPU_BATCH_ITEMS


class TextTrial:
    """See Trial: texts of many lengths and scripts, whose vectors are compared by their cosine."""

    unit = "text"
    least_nearness = MIN_COSINE

    def __init__(self, reference: Encoder) -> None:
        self._reference = reference
        self.golden = reference.pooled(reference.tokenize(SHORT_GOLDEN_TEXTS))

    @cached_property
    def _batches(self) -> list[list[Tokens]]:
        return golden_batches(self._reference.tokenize(GOLDEN_TEXTS))

    @cached_property
    def _expected(self) -> NDArray[np.float32]:
        return self._vectors(self._reference)

    def _vectors(self, encoder: Encoder) -> NDArray[np.float32]:
        return np.concatenate([encoder.pooled(batch) for batch in self._batches])

    def judge(self, model: Encoder | None) -> Verdict:
        """See Trial."""
        found = Agreement(1.0, 1.0) if model is None else agreement(self._vectors(model), self._expected)
        return Verdict(
            {"min_cosine": round(found.least, 6), "mean_cosine": round(found.mean, 6)},
            found.least,
            found.least >= MIN_COSINE,
            f"its least cosine to fp32 over the golden texts is {found.least:.5f}",
            f"under {MIN_COSINE}",
        )

    def nearness(self, model: Encoder) -> float:
        """See Trial."""
        return text_nearness(model, self.golden)

    def batch(self, model: Encoder) -> int:
        """See Trial."""
        items = batch_items(model.device)
        model.pooled([self._sample(_BATCH_TOKENS)] * items)
        return items

    def short(self, model: Encoder) -> None:
        """See Trial."""
        model.pooled([self._sample(_SHORT_TOKENS)])

    def _sample(self, tokens: int) -> Tokens:
        return Tokens(self._sample_ids[:tokens], True)

    @cached_property
    def _sample_ids(self) -> Sequence[int]:
        (text,) = self._reference.tokenize(["The quick brown fox jumps over the lazy dog again. " * 40])
        return text.ids


def text_nearness(encoder: Encoder, golden: NDArray[np.float32]) -> float:
    """Return the least cosine of *encoder*'s vectors of SHORT_GOLDEN_TEXTS to *golden*, shape [texts, dim]."""
    return agreement(encoder.pooled(encoder.tokenize(SHORT_GOLDEN_TEXTS)), golden).least
