"""
A model repository for NVIDIA's Triton Inference Server: the model, and a `config.pbtxt` that says what is in it.

The configuration is built as the server's own message (`ModelConfig`) and read back with the protobuf text parser.
`triton_model_config.textproto` has the message's definition and its licence; the package `tritonclient`, which has it
too, would hold protobuf, ml_dtypes and others at old versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import onnx
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from services.embedding.offline.console import OfflineError

CONFIG_FILE = "config.pbtxt"
VERSION = "1"
# Triton's names of ONNX's element types.
_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}
_SMALLEST_PREFERRED = 8
_HEADER = """\
# Pooled vectors come out of sentence_embedding; ask for token_embeddings only if you need them.
# Texts are tokenised by the caller (folder tokenizer), cut to max_tokens and padded on the right with a mask of 0.
# The server joins requests of one shape: pad to a few lengths (32, 64, 128 …) so that more of them meet.
"""


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """
    How the server is to run a model.

    *max_batch_size* counts texts; *max_queue_delay_us* is how long it may wait for more, in microseconds.
    *parameters* are notes for people and tools, by name.
    """

    max_batch_size: int
    max_queue_delay_us: int
    device: Literal["cpu", "cuda"]
    instances: int
    parameters: dict[str, str]


@cache
def _config_class() -> Any:
    text = files(__package__).joinpath("triton_model_config.textproto").read_text(encoding="utf-8")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def parse_config(text: str) -> Any:
    """
    Read a `config.pbtxt` as Triton does.

    Raises:
        OfflineError: It has a field that there is not, or is no protobuf text.
    """
    try:
        return text_format.Parse(text, _config_class()())
    except text_format.ParseError as error:
        raise OfflineError(f"no Triton model configuration: {error}") from error


def write_config(model_file: Path, directory: Path, name: str, options: TritonOptions) -> None:
    """
    Write the configuration of *model_file*, to be called *name*, into *directory* and check it.

    Raises:
        OfflineError: The model has inputs or outputs that Triton cannot batch.
    """
    graph = onnx.load(model_file, load_external_data=False).graph
    config = _config_class()(
        name=name,
        backend="onnxruntime",
        default_model_filename=model_file.name,
        max_batch_size=options.max_batch_size,
        version_policy={"latest": {"num_versions": 1}},
        dynamic_batching={
            "preferred_batch_size": preferred_sizes(options.max_batch_size),
            "max_queue_delay_microseconds": options.max_queue_delay_us,
        },
        instance_group=[{"count": options.instances, "kind": "KIND_GPU" if options.device == "cuda" else "KIND_CPU"}],
        parameters={key: {"string_value": value} for key, value in sorted(options.parameters.items())},
        input=[_tensor(value) for value in graph.input],
        output=[_tensor(value) for value in graph.output],
    )
    file = directory / CONFIG_FILE
    file.write_text(_HEADER + text_format.MessageToString(config), encoding="utf-8")
    check_config(file, model_file)


def preferred_sizes(max_batch_size: int) -> list[int]:
    """Return the powers of two from 8 that a batch may reach, and *max_batch_size* itself, smallest first."""
    sizes, size = {max_batch_size}, _SMALLEST_PREFERRED
    while size < max_batch_size:
        sizes.add(size)
        size *= 2
    return sorted(sizes)


def check_config(config_file: Path, model_file: Path) -> None:
    """
    See that what *config_file* says of inputs and outputs is what *model_file* has.

    Raises:
        OfflineError: The two differ, or the file cannot be read.
    """
    config = parse_config(config_file.read_text(encoding="utf-8"))
    graph = onnx.load(model_file, load_external_data=False).graph
    data_type = _config_class().DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    for kind, said, there in (("input", config.input, graph.input), ("output", config.output, graph.output)):
        found = [(item.name, data_type.values_by_number[item.data_type].name, list(item.dims)) for item in said]
        expected = [(item["name"], item["data_type"], item["dims"]) for item in map(_tensor, there)]
        if found != expected:
            raise OfflineError(f"{config_file} names the {kind}s {found}, and {model_file.name} has {expected}")


def _tensor(value: Any) -> dict[str, Any]:
    """Return a graph's input or output as the configuration has it: without the batch, and -1 for sizes that vary."""
    shape: Sequence[Any] = value.type.tensor_type.shape.dim
    element = value.type.tensor_type.elem_type
    if not shape or shape[0].HasField("dim_value"):
        raise OfflineError(f"{value.name} has no axis for batches")
    if element not in _TYPES:
        raise OfflineError(f"{value.name} has elements that Triton does not know: {element}")
    dims = [int(axis.dim_value) if axis.HasField("dim_value") else -1 for axis in shape[1:]]
    return {"name": value.name, "data_type": _TYPES[element], "dims": dims}
