"""What an encoder is, whatever computes it, and how one is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.description import ModelDescription
from services.common.encoders.tokenizer import TextTokenizer
from services.common.tokens import Tokens, TruncationDirection

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Runtime = Literal["auto", "torch", "openvino"]
PoolingMode = Literal["cls", "mean", "lasttoken", "weightedmean", "max"]


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """
    How a model is to be loaded.

    *pooling* None keeps what the model's own modules say, *max_tokens* None the model's own limit. *threads* 0 is all
    the cores that the process may use. *projection* is a file that `Projection.save` wrote; it is applied to the
    pooled vectors. *cache_dir* None is `$XDG_CACHE_HOME/tercet`, else `~/.cache/tercet`. *measure_apart* measures in
    a process of its own, so that this one is not left with the memory of every runtime that was tried.
    """

    revision: str | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    runtime: Runtime = "auto"
    pooling: PoolingMode | None = None
    max_tokens: int | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None
    threads: int = 0
    projection: Path | None = None
    measure_apart: bool = False


class Encoder(Protocol):
    """
    A loaded model. `tokenize` may be called from any thread; `pooled`, `per_token` and `close` from one at a time.

    *reason* says in words why this *runtime* and *precision*; *measured* has the figures behind it by candidate
    (`openvino bf16`): `min_cosine` and `mean_cosine` to fp32, `batch_texts_per_s`, `short_text_ms`.
    *weights_bytes* is what the weights take in memory as they are computed with.
    """

    description: ModelDescription
    tokenizer: TextTokenizer
    runtime: str
    device: str
    precision: str
    reason: str
    measured: Mapping[str, Mapping[str, float]]
    weights_bytes: int

    def tokenize(
        self, texts: Sequence[str], *, max_tokens: int | None = None, direction: TruncationDirection = "right"
    ) -> list[Tokens]:
        """Tokenise *texts* in order, each cut to the model's limit, or to *max_tokens* if that is less."""
        ...

    def pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """
        Return what the model's own modules make of each text: float32, shape [len(batch), dim], in order.

        A last module that only brings vectors to unit length is left out: that is the caller's choice.

        Raises:
            OutOfMemory: The device's memory does not hold even one of the texts.
        """
        ...

    def per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """
        Return each text's token vectors, special tokens included: float32, shape [len(ids), token_dim] each.

        Raises:
            OutOfMemory: The device's memory does not hold even one of the texts.
        """
        ...

    def close(self) -> None:
        """Give the memory back; nothing is called afterwards."""
        ...


class Identified(Protocol):
    """What a model's fingerprint is made of; see ModelDescription."""

    @property
    def files_digest(self) -> str:
        """See ModelDescription."""
        ...

    @property
    def variant(self) -> str:
        """See ModelDescription."""
        ...

    @property
    def max_tokens(self) -> int:
        """See ModelDescription."""
        ...


def fingerprint_of(encoder: Encoder, name: str) -> str:
    """
    Return the name under which vectors of *encoder* may be compared: equal fingerprints, equal vectors.

    fp32, bf16 and fp16 share one, for they are held within a cosine of 0.999 of each other; int8 has its own.
    """
    return fingerprint(name, encoder.description, encoder.precision)


def fingerprint(name: str, description: Identified, precision: str) -> str:
    """Return the name under which outputs of a model may be compared; see `fingerprint_of`."""
    lossy = "+int8" if precision == "int8" else ""
    short = name.rstrip("/").rsplit("/", 1)[-1]
    return f"{short}@{description.files_digest[:16]}/{description.max_tokens}{description.variant}{lossy}"
