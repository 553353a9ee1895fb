"""A scorer of pairs through OpenVINO; see graphs and graph_runner."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.batches import padded
from services.common.encoders.compiled import Inputs
from services.common.encoders.graph_runner import GraphRunner
from services.common.encoders.graphs import TEXT_INPUTS
from services.common.encoders.pairs.form import PairForm, PairTokenizer, PairTokens, padded_types
from services.common.encoders.pairs.model import PairDescription


def inputs_of(form: PairForm) -> tuple[str, ...]:
    """Return the names of what a model takes that reads pairs in this form."""
    return TEXT_INPUTS if form.types is None else (*TEXT_INPUTS, "token_type_ids")


class GraphPairs:
    """See PairModel."""

    runtime = "openvino"
    device = "cpu"

    def __init__(
        self, graph: Any, description: PairDescription, tokenizer: PairTokenizer, *, precision: str, threads: int
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
            inputs=inputs_of(description.form),
        )
        self.weights_bytes = self._runner.weights_bytes

    def outputs(self, batch: Sequence[PairTokens]) -> NDArray[np.float32]:
        """See PairModel."""

        def arrays(positions: Sequence[int], shape: tuple[int, int]) -> Inputs:
            part = [batch[position] for position in positions]
            return arrays_of(part, self.description, shape=shape)

        return self._runner.rows([len(item.tokens.ids) for item in batch], arrays)

    def close(self) -> None:
        """See PairModel."""
        self._runner.close()


def arrays_of(
    batch: Sequence[PairTokens], description: PairDescription, *, shape: tuple[int, int] | None = None
) -> Inputs:
    """Return the model's inputs for *batch* by name, padded on the right, to *shape* where that is larger."""
    ids, mask = padded([item.tokens for item in batch], description.pad_id, shape=shape)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if description.form.types is not None:
        inputs["token_type_ids"] = padded_types(batch, (ids.shape[0], ids.shape[1]))
    return inputs
