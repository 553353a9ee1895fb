"""
An encoder through OpenVINO: a graph traced once from the model's torch modules and kept on disk as IR.

Starting from a kept graph needs neither torch nor transformers. OpenVINO is imported when it is first used.
"""

import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.batches import divided, longest_of, padded, rounded_up
from services.common.encoders.compiled import CompiledGraph, Inputs
from services.common.encoders.description import ModelDescription
from services.common.encoders.hardware import usable_cores
from services.common.encoders.tokenizer import TextTokenizer
from services.common.encoders.weight_compression import compress_weights
from services.common.tokens import Tokens, TruncationDirection

if TYPE_CHECKING:
    from services.common.encoders.modules import TraceableEncoder

_FORMAT = 2
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
_POOLED, _PER_TOKEN = 0, 1
# What the runtime keeps of the shapes it has met, some six entries each: by default 5,000, which is most of a gigabyte.
# A shape that was forgotten costs 2 ms more.
RUNTIME_CACHE_ENTRIES = 400
# Weights (at fp32) up to which a batch's parts are computed side by side: the second form has its own copy of them.
DIVIDED_BYTES = 600_000_000
_GRAPH_FILE = "model.xml"


class GraphError(Exception):
    """The model cannot be made a graph, or the graph does not run here."""


def load_openvino() -> Any:
    """
    Import OpenVINO, which from then on reports nothing to anybody.

    Its converter sends usage reports through the package openvino-telemetry, and takes a stub that sends none where
    that package cannot be imported.

    Raises:
        GraphError: It is not installed, or does not run here.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except (ImportError, OSError) as error:
        raise GraphError(f"OpenVINO cannot be imported: {error}") from error
    return openvino


def graph_directory(cache_dir: Path, description: ModelDescription) -> Path:
    """Return where the graph of the model is kept: by its files, options, OpenVINO's version and ours."""
    try:
        release = version("openvino")
    except PackageNotFoundError as error:
        raise GraphError("OpenVINO is not installed") from error
    return cache_dir / "graphs" / f"{description.digest[:32]}-{release}-{_FORMAT}"


def make_graph(modules: "TraceableEncoder") -> Any:
    """
    Trace *modules*, which are on the CPU, into a graph with dynamic shapes.

    Raises:
        GraphError: OpenVINO cannot convert them.
    """
    openvino = load_openvino()
    import torch

    example = torch.full((2, 16), 1, dtype=torch.long)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of tracing as such, and of branches that shapes decide.
            return openvino.convert_model(
                modules, example_input={"input_ids": example, "attention_mask": torch.ones_like(example)}
            )
    except Exception as error:  # Tracing runs the model's code, which may raise anything.
        raise GraphError(f"OpenVINO cannot convert it: {_first_line(error)}") from error


def keep_graph(directory: Path, graph: Any) -> None:
    """
    Keep *graph* in *directory*, whole or not at all; what another process has put there meanwhile stays.

    Raises:
        OSError: It cannot be written.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
    try:
        try:
            load_openvino().save_model(graph, made / _GRAPH_FILE, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(_first_line(error)) from error
        try:
            made.replace(directory)
        except OSError:
            if not (directory / _GRAPH_FILE).is_file():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_graph(directory: Path) -> Any:
    """
    Read what `keep_graph` wrote; the weights stay in the file until they are used.

    Raises:
        GraphError: There is none, or it is damaged.
    """
    openvino = load_openvino()
    try:
        return openvino.Core().read_model(directory / _GRAPH_FILE)
    except Exception as error:  # OpenVINO raises bare RuntimeErrors.
        raise GraphError(f"the kept graph cannot be read: {_first_line(error)}") from error


def drop_graph(directory: Path) -> None:
    """Remove a kept graph that is damaged."""
    shutil.rmtree(directory, ignore_errors=True)


class GraphEncoder:
    """
    See Encoder. Each of its two outputs is a compiled model of its own, made when it is first asked for.
    """

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
        self._openvino = load_openvino()
        self._core = self._openvino.Core()
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "CPU_RUNTIME_CACHE_CAPACITY": str(RUNTIME_CACHE_ENTRIES),
            "ENABLE_CPU_PINNING": False,  # Several models or services on one machine would be pinned to the same cores.
        }
        self._threads = threads or usable_cores()
        self._divide = description.weights_bytes <= DIVIDED_BYTES
        copies = 2 if self._divide and self._threads > 1 else 1  # See CompiledGraph: each form has its own.
        self.weights_bytes = copies * description.weights_bytes // (4 if precision == "int8" else 1)
        self._graph = graph.clone() if precision == "int8" else graph
        if precision == "int8":
            compress_weights(self._graph)
        self._compiled: dict[int, CompiledGraph] = {}
        self._thread = threading.get_ident()

    def tokenize(
        self, texts: Sequence[str], *, max_tokens: int | None = None, direction: TruncationDirection = "right"
    ) -> list[Tokens]:
        """See Encoder."""
        return self.tokenizer.tokenize(texts, max_tokens, direction)

    def pooled(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """See Encoder."""
        made: NDArray[np.float32] | None = None
        for positions, vectors in self._infer(batch, _POOLED):
            if made is None:
                made = np.empty((len(batch), vectors.shape[1]), dtype=np.float32)
            made[positions] = vectors[: len(positions)]
        assert made is not None, "a batch has parts"
        return made

    def per_token(self, batch: Sequence[Tokens]) -> list[NDArray[np.float32]]:
        """See Encoder."""
        made: dict[int, NDArray[np.float32]] = {}
        for positions, vectors in self._infer(batch, _PER_TOKEN):
            for row, position in enumerate(positions):
                # A copy: a view would keep the whole array alive for as long as one text's vectors are kept.
                made[position] = vectors[row, : len(batch[position].ids)].copy()
        return [made[position] for position in range(len(batch))]

    def close(self) -> None:
        """See Encoder."""
        self._compiled.clear()
        self._graph = None

    def _infer(self, batch: Sequence[Tokens], output: int) -> list[tuple[list[int], NDArray[np.float32]]]:
        """Return the parts of *batch*: positions in it, and their output, which may have rows of padding at its end."""
        if self._thread != threading.get_ident():
            for one in self._compiled.values():
                one.forget_requests()
            self._thread = threading.get_ident()
        compiled = self._compiled.get(output)
        if compiled is None:
            compiled = self._compiled[output] = self._compile(output)
            compiled.measure(self.description.max_tokens)
        parts = divided([len(item.ids) for item in batch], compiled.streams)
        inputs = [self._inputs([batch[position] for position in positions]) for positions in parts]
        return list(zip(parts, compiled.run(inputs), strict=True))

    def _inputs(self, part: Sequence[Tokens]) -> Inputs:
        # The runtime prepares itself for each shape that it meets: milliseconds each.
        longest = min(rounded_up(longest_of(part)), max(self.description.max_tokens, longest_of(part)))
        ids, mask = padded(part, self.description.pad_id, shape=(rounded_up(len(part)), longest))
        return {"input_ids": ids, "attention_mask": mask}

    def _compile(self, output: int) -> CompiledGraph:
        if self._graph is None:
            raise RuntimeError("the encoder is closed")
        alone = self._openvino.Model([self._graph.output(output)], self._graph.get_parameters(), "encoder")
        try:
            compiled = CompiledGraph(self._core, alone, self._settings, threads=self._threads, divide=self._divide)
            used = compiled.precision
        except Exception as error:
            raise GraphError(f"the graph does not run here at {self.precision}: {_first_line(error)}") from error
        if used != _HINTS[self.precision]:
            raise GraphError(f"this processor does not compute {self.precision}: OpenVINO would use {used}")
        return compiled


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
