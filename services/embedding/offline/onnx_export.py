"""A model's own modules as an ONNX file, with its tokenizer beside it, checked against torch."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnx
import torch

from services.common.encoders import EncoderOptions, ModelDescription, Projection, fingerprint_of
from services.common.encoders.hardware import usable_cores
from services.common.encoders.modules import TraceableEncoder, describe, load_modules
from services.common.encoders.torch_encoder import TorchEncoder
from services.common.model_files import check_model_files, files_digest, resolve_model
from services.embedding.offline.console import OfflineError
from services.embedding.offline.output import MARK
from services.embedding.offline.parity import MIN_COSINE, Parity, compare

OnnxPrecision = Literal["fp32", "int8"]

MODEL_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("sentence_embedding", "token_embeddings")
# An ONNX file is one protobuf message, of 2 GiB at most; the weights of larger models go into a second file.
_MAX_INLINE_BYTES = 3 << 29
_LIBRARIES = ("tercet", "torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Source:
    """A model as it is exported: what it is, its modules at fp32 on the CPU, and the encoder to compare with."""

    description: ModelDescription
    modules: TraceableEncoder
    reference: TorchEncoder


@dataclass(frozen=True, slots=True)
class Exported:
    """A written ONNX file: *fingerprint* names its vectors, *opset* is the version of the operators in it."""

    file: Path
    precision: OnnxPrecision
    fingerprint: str
    opset: int
    parity: Parity


def load_source(name: str, options: EncoderOptions) -> Source:
    """
    Load the model *name* for export.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: It is damaged, or cannot be computed as asked.
    """
    directory = resolve_model(name, revision=options.revision)
    check_model_files(directory)
    torch.set_num_threads(options.threads or usable_cores())
    projection = Projection.load(options.projection) if options.projection else None
    model = load_modules(directory, options, device="cpu")
    description, tokenizer, _ = describe(model, name, directory, files_digest(directory), options, projection)
    modules = TraceableEncoder(model, projection).eval()
    return Source(description, modules, TorchEncoder(modules, description, tokenizer, device="cpu", precision="fp32"))


def write_onnx(source: Source, directory: Path, *, precision: OnnxPrecision, opset: int | None) -> Exported:
    """
    Write `model.onnx` into *directory*, check it and run it beside torch.

    int8 has its loss measured and is not refused for it. *opset* None is the exporter's own choice.

    Raises:
        OfflineError: The model cannot be exported, or what was exported computes something else.
    """
    file = directory / MODEL_FILE
    if precision == "int8":
        whole = directory / "fp32"
        whole.mkdir()
        _export(source, whole / MODEL_FILE, opset)
        _quantise(whole / MODEL_FILE, file, source.description)
        for part in whole.iterdir():
            part.unlink()
        whole.rmdir()
    else:
        _export(source, file, opset)
    try:
        onnx.checker.check_model(file, full_check=True)
    except Exception as error:  # The checker has several errors, in several versions.
        raise OfflineError(f"the exported model is not valid ONNX: {error}") from error
    parity = compare(file, source.reference)
    if precision == "fp32" and parity.min_cosine < MIN_COSINE:
        raise OfflineError(
            f"the exported model does not compute what the model does: least cosine {parity.min_cosine:.6f} over "
            f"{parity.texts} texts, below {MIN_COSINE}; nothing was written"
        )
    graph = onnx.load(file, load_external_data=False)
    versions = {item.domain: int(item.version) for item in graph.opset_import}
    fingerprint = fingerprint_of(source.reference, source.description.name)
    lossy = "+onnx-int8" if precision == "int8" else ""
    return Exported(file, precision, fingerprint + lossy, versions.get("", 0), parity)


def _export(source: Source, file: Path, opset: int | None) -> None:
    # Two texts of sixteen tokens: sizes of 0 and 1 would be taken for constants.
    ids = torch.full((2, 16), source.description.pad_id, dtype=torch.long)
    axes = {0: "batch", 1: "tokens"}
    try:
        with torch.no_grad():
            torch.onnx.export(
                source.modules,
                (ids, torch.ones_like(ids)),
                file,
                dynamo=True,
                verbose=False,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                external_data=source.description.weights_bytes > _MAX_INLINE_BYTES,
                opset_version=opset,
            )
    except Exception as error:  # Exporting runs the model's code, which may raise anything.
        raise OfflineError(f"torch.onnx cannot export {source.description.name}: {_first_line(error)}") from error


def _quantise(whole: Path, file: Path, description: ModelDescription) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        # One scale for each output channel: one for a whole matrix loses several times as much.
        quantize_dynamic(
            whole,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=description.weights_bytes // 4 > _MAX_INLINE_BYTES,
        )
    except Exception as error:  # It has no errors of its own.
        raise OfflineError(f"ONNX Runtime cannot quantise {description.name}: {_first_line(error)}") from error


def write_tokenizer(source: Source, directory: Path) -> None:
    """Write the tokenizer's files and the model's `config.json` into *directory*, as transformers reads them."""
    transformer: Any = source.modules.model[0]
    tokenizer = source.modules.model.tokenizer
    tokenizer.model_max_length = source.description.max_tokens
    tokenizer.save_pretrained(directory)
    transformer.auto_model.config.save_pretrained(directory)


def write_record(source: Source, exported: Exported, directory: Path) -> None:
    """Write `tercet_export.json`: where the model comes from, how to use it, and how near it is to torch."""
    description = source.description
    record = {
        "source": description.name,
        "digest": description.digest,
        "fingerprint": exported.fingerprint,
        "precision": exported.precision,
        "dim": description.dim,
        "token_dim": description.token_dim,
        "max_tokens": description.max_tokens,
        "pooling": description.pooling,
        "similarity": description.similarity,
        "prompts": dict(description.prompts),
        "default_prompt": description.default_prompt,
        "pad_id": description.pad_id,
        "inputs": list(INPUTS),
        "outputs": list(OUTPUTS),
        "opset": exported.opset,
        "parity": exported.parity.as_dict(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    (directory / MARK).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
