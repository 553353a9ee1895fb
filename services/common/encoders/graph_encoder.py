"""An encoder through OpenVINO; see graphs and graph_runner."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.batches import padded
from services.common.encoders.compiled import Inputs
from services.common.encoders.description import ModelDescription
from services.common.encoders.graph_runner import GraphRunner, InputsOf
from services.common.encoders.tokenizer import TextTokenizer
from services.common.tokens import Tokens, TruncationDirection

_POOLED, _PER_TOKEN = 0, 1


class GraphEncoder:
    """See Encoder."""

    runtime = "openvino"
    device = "cpu"

    def __init__(
        self,
        graph: Any,
        description: ModelDescription,
        tokenizer: TextTokenizer,
        *,
        precision: str,
        threads: int,
    ) -> None:
        self.description = description
        self.tokenizer = tokenizer
        self.precision = precision
        self.reason = ""
        self.measured: Mapping[str, Mapping[str, float]] = {}
        self._runner = GraphRunner(
            graph,
            precision=precision,
            threads=threads,
            weights_bytes=description.weights_bytes,
            most_tokens=description.max_tokens,
        )
        self.weights_bytes = self._runner.weights_bytes

    def tokenize(
        self, texts: Sequence[str], *, max_tokens: int | None = None, direction: TruncationDirection = "right"
    ) -> list[Tokens]:
        """See Encoder."""
        return self.tokenizer.tokenize(texts, max_tokens, direction)

    def pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Encoder."""
        return self._runner.rows(_lengths(batch), self._arrays(batch), output=_POOLED)

    def per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """See Encoder."""
        made: dict[int, NDArray[np.float32]] = {}
        for positions, vectors in self._runner.run(_lengths(batch), self._arrays(batch), output=_PER_TOKEN):
            for row, position in enumerate(positions):
                # A copy: a view would keep the whole array alive for as long as one text's vectors are kept.
                made[position] = vectors[row, : len(batch[position].ids)].copy()
        return [made[position] for position in range(len(batch))]

    def close(self) -> None:
        """See Encoder."""
        self._runner.close()

    def _arrays(self, batch: Sequence[Tokens]) -> InputsOf:
        def arrays(positions: Sequence[int], shape: tuple[int, int]) -> Inputs:
            part = [batch[position] for position in positions]
            ids, mask = padded(part, self.description.pad_id, shape=shape)
            return {"input_ids": ids, "attention_mask": mask}

        return arrays


def _lengths(batch: Sequence[Tokens]) -> list[int]:
    return [len(item.ids) for item in batch]
