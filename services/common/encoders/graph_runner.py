"""A graph's outputs, computed batch by batch: how each is compiled, cut into parts and padded."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.batches import divided, rounded_up
from services.common.encoders.compiled import CompiledGraph, Inputs
from services.common.encoders.graphs import TEXT_INPUTS, GraphError, first_line, load_openvino, openvino_core
from services.common.encoders.hardware import usable_cores
from services.common.encoders.weight_compression import compress_weights

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
# What the runtime keeps of the shapes it has met, some six entries each: by default 5,000, which is most of a gigabyte.
# A shape that was forgotten costs 2 ms more.
RUNTIME_CACHE_ENTRIES = 400
# Weights (at fp32) up to which a batch's parts are computed side by side: the second form has its own copy of them.
DIVIDED_BYTES = 600_000_000

InputsOf = Callable[[Sequence[int], tuple[int, int]], Inputs]
Rows = tuple[list[int], NDArray[np.float32]]


class GraphRunner:
    """
    Computes *graph* at *precision*; each of its outputs is a compiled model of its own, made when first asked for.

    *weights_bytes* are those at fp32; the attribute says what is taken in memory. *inputs* are the names of the graph's
    inputs, *most_tokens* is the longest text that it is meant for. Used by one thread at a time.
    """

    def __init__(
        self,
        graph: Any,
        *,
        precision: str,
        threads: int,
        weights_bytes: int,
        most_tokens: int,
        inputs: Sequence[str] = TEXT_INPUTS,
    ) -> None:
        self._openvino = load_openvino()
        self._core = openvino_core()
        self._precision = precision
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "CPU_RUNTIME_CACHE_CAPACITY": str(RUNTIME_CACHE_ENTRIES),
            "ENABLE_CPU_PINNING": False,  # Several models or services on one machine would be pinned to the same cores.
        }
        self._most_tokens = most_tokens
        self._inputs = tuple(inputs)
        self._threads = threads or usable_cores()
        self._divide = weights_bytes <= DIVIDED_BYTES
        copies = 2 if self._divide and self._threads > 1 else 1  # See CompiledGraph: each form has its own.
        self.weights_bytes = copies * weights_bytes // (4 if precision == "int8" else 1)
        self._graph = graph.clone() if precision == "int8" else graph
        if precision == "int8":
            compress_weights(self._graph)
        self._compiled: dict[int, CompiledGraph] = {}
        self._thread = threading.get_ident()

    def run(self, lengths: Sequence[int], inputs: InputsOf, *, output: int = 0) -> list[Rows]:
        """
        Compute a batch of texts of these *lengths* in parts: positions in the batch, and their rows of *output*.

        *inputs* makes the arrays of the positions it is given, padded to the shape it is given: the runtime prepares
        itself for each shape that it meets, milliseconds each. Rows of padding may follow those of the positions.
        """
        if self._thread != threading.get_ident():
            for one in self._compiled.values():
                one.forget_requests()
            self._thread = threading.get_ident()
        compiled = self._compiled.get(output)
        if compiled is None:
            compiled = self._compiled[output] = self._compile(output)
            compiled.measure(self._most_tokens, self._inputs)
        parts = divided(lengths, compiled.streams)
        arrays = [inputs(part, self._shape(lengths, part)) for part in parts]
        return list(zip(parts, compiled.run(arrays), strict=True))

    def rows(self, lengths: Sequence[int], inputs: InputsOf, *, output: int = 0) -> NDArray[np.float32]:
        """Return *output* of a whole batch that has a vector for each text, in order; see `run`."""
        made: NDArray[np.float32] | None = None
        for positions, vectors in self.run(lengths, inputs, output=output):
            if made is None:
                made = np.empty((len(lengths), vectors.shape[1]), dtype=np.float32)
            made[positions] = vectors[: len(positions)]
        assert made is not None, "a batch has parts"
        return made

    def close(self) -> None:
        """Give the memory back; nothing is called afterwards."""
        self._compiled.clear()
        self._graph = None

    def _shape(self, lengths: Sequence[int], part: Sequence[int]) -> tuple[int, int]:
        longest = max((1, *(lengths[position] for position in part)))
        return rounded_up(len(part)), min(rounded_up(longest), max(self._most_tokens, longest))

    def _compile(self, output: int) -> CompiledGraph:
        if self._graph is None:
            raise RuntimeError("the model is closed")
        alone = self._openvino.Model([self._graph.output(output)], self._graph.get_parameters(), "encoder")
        try:
            compiled = CompiledGraph(self._core, alone, self._settings, threads=self._threads, divide=self._divide)
            used = compiled.precision
        except Exception as error:
            raise GraphError(f"the graph does not run here at {self._precision}: {first_line(error)}") from error
        if used != _HINTS[self._precision]:
            raise GraphError(f"this processor does not compute {self._precision}: OpenVINO would use {used}")
        return compiled
