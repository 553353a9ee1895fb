"""An encoder through torch: any architecture, on a CPU, CUDA or MPS."""

import copy
import gc
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.encoders.batches import in_halves, padded
from services.common.encoders.description import ModelDescription
from services.common.encoders.modules import TraceableEncoder
from services.common.encoders.tokenizer import TextTokenizer
from services.common.tokens import Tokens, TruncationDirection

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def reduced(modules: ModuleT, precision: str) -> ModuleT:
    """Return a copy of *modules* whose weights are *precision*; buffers (positions' frequencies) stay as they are."""
    made = copy.deepcopy(modules)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(REDUCED[precision])
    return made


def is_out_of_memory(error: BaseException) -> bool:
    """Whether *error* is torch's way to say that the device's memory is full."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def free_memory(device: str) -> None:
    """Give what torch holds of *device*'s memory without using it back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


class TorchEncoder:
    """
    See Encoder. *autocast* computes at *precision* over weights that stay fp32.

    A batch that the device's memory does not hold is computed in halves, down to single texts.
    """

    runtime = "torch"

    def __init__(
        self,
        modules: TraceableEncoder,
        description: ModelDescription,
        tokenizer: TextTokenizer,
        *,
        device: str,
        precision: str,
        autocast: bool = False,
    ) -> None:
        self.description = description
        self.tokenizer = tokenizer
        self.device = device
        self.precision = precision
        self.reason = ""
        self.measured: Mapping[str, Mapping[str, float]] = {}
        self.weights_bytes = sum(parameter.nbytes for parameter in modules.parameters())
        self._modules: TraceableEncoder | None = modules
        self._autocast = REDUCED[precision] if autocast else None

    def tokenize(
        self, texts: Sequence[str], *, max_tokens: int | None = None, direction: TruncationDirection = "right"
    ) -> list[Tokens]:
        """See Encoder."""
        return self.tokenizer.tokenize(texts, max_tokens, direction)

    def pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Encoder."""
        rows = in_halves(self._pooled, batch, is_out_of_memory=is_out_of_memory, free=self._free)
        return np.stack(rows)

    def per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """See Encoder."""
        return in_halves(self._per_token, batch, is_out_of_memory=is_out_of_memory, free=self._free)

    def close(self) -> None:
        """See Encoder."""
        self._modules = None
        self._free()

    def _pooled(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        return list(self._forward(batch)[0].float().cpu().numpy())

    def _per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        vectors = self._forward(batch)[1].float().cpu().numpy()
        # Copies: a view would keep the whole batch's array alive for as long as one text's vectors are kept.
        return [vectors[row, : len(item.ids)].copy() for row, item in enumerate(batch)]

    def _forward(self, batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._modules is None:
            raise RuntimeError("the encoder is closed")
        ids, mask = (torch.from_numpy(array).to(self.device) for array in padded(batch, self.description.pad_id))
        with (
            torch.inference_mode(),
            torch.autocast(self.device, dtype=self._autocast, enabled=self._autocast is not None),
        ):
            output: tuple[torch.Tensor, torch.Tensor] = self._modules(ids, mask)
        return output

    def _free(self) -> None:
        free_memory(self.device)
