"""
Graphs as OpenVINO has them: traced once from a model's torch modules, and kept on disk as IR.

Starting from a kept graph needs neither torch nor transformers. OpenVINO is imported when it is first used.
"""

import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

TEXT_INPUTS: Final = ("input_ids", "attention_mask")
_FORMAT = 2
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


@cache
def openvino_core() -> Any:
    """
    Return the one Core of this process, which is kept: with the last one its plugins are unloaded, and a SIGINT that comes
    then runs a handler that is no longer there.

    Raises:
        GraphError: OpenVINO is not installed, or does not run here.
    """
    return load_openvino().Core()


def graph_directory(cache_dir: Path, digest: str) -> Path:
    """
    Return where a model's graph is kept: by its files and options, for which *digest* stands, and both our versions.

    Raises:
        GraphError: OpenVINO is not installed.
    """
    try:
        release = version("openvino")
    except PackageNotFoundError as error:
        raise GraphError("OpenVINO is not installed") from error
    return cache_dir / "graphs" / f"{digest[:32]}-{release}-{_FORMAT}"


def make_graph(modules: "torch.nn.Module", inputs: Sequence[str] = TEXT_INPUTS) -> Any:
    """
    Trace *modules*, which are on the CPU and take tensors [batch, tokens] of ints by these names, with dynamic shapes.

    Raises:
        GraphError: OpenVINO cannot convert them.
    """
    openvino = load_openvino()
    import torch

    example = torch.full((2, 16), 1, dtype=torch.long)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of tracing as such, and of branches that shapes decide.
            return openvino.convert_model(modules, example_input={name: example.clone() for name in inputs})
    except Exception as error:  # Tracing runs the model's code, which may raise anything.
        raise GraphError(f"OpenVINO cannot convert it: {first_line(error)}") from error


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
            raise OSError(first_line(error)) from error
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
    core = openvino_core()
    try:
        return core.read_model(directory / _GRAPH_FILE)
    except Exception as error:  # OpenVINO raises bare RuntimeErrors.
        raise GraphError(f"the kept graph cannot be read: {first_line(error)}") from error


def drop_graph(directory: Path) -> None:
    """Remove a kept graph that is damaged."""
    shutil.rmtree(directory, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """Return the first line of what *error* says, cut to 300 characters; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
