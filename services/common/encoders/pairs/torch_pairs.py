"""A scorer of pairs through torch: any architecture, on a CPU, CUDA or MPS."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.encoders.batches import in_halves
from services.common.encoders.pairs.form import PairTokenizer, PairTokens
from services.common.encoders.pairs.graph import arrays_of
from services.common.encoders.pairs.model import PairDescription
from services.common.encoders.torch_encoder import REDUCED, free_memory, is_out_of_memory


class TorchPairs:
    """
    See PairModel. *autocast* computes at *precision* over weights that stay fp32.

    A batch that the device's memory does not hold is computed in halves, down to single pairs.
    """

    runtime = "torch"

    def __init__(
        self,
        modules: torch.nn.Module,
        description: PairDescription,
        tokenizer: PairTokenizer,
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
        self._modules: torch.nn.Module | None = modules
        self._autocast = REDUCED[precision] if autocast else None

    def outputs(self, batch: Sequence[PairTokens]) -> NDArray[np.float32]:
        """See PairModel."""
        rows = in_halves(self._outputs, batch, is_out_of_memory=is_out_of_memory, free=self._free)
        return np.stack(rows)

    def close(self) -> None:
        """See PairModel."""
        self._modules = None
        self._free()

    def _outputs(self, batch: Sequence[PairTokens]) -> list[NDArray[np.float32]]:
        if self._modules is None:
            raise RuntimeError("the model is closed")
        inputs = {
            name: torch.from_numpy(array).to(self.device) for name, array in arrays_of(batch, self.description).items()
        }
        with (
            torch.inference_mode(),
            torch.autocast(self.device, dtype=self._autocast, enabled=self._autocast is not None),
        ):
            outputs = self._modules(**inputs)
        return list(outputs.float().cpu().numpy())

    def _free(self) -> None:
        free_memory(self.device)
