"""`export`: a model as an ONNX directory or as part of a Triton model repository."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from services.common.encoders import EncoderOptions
from services.embedding.offline.console import OfflineError, say
from services.embedding.offline.output import check_free, new_directory

if TYPE_CHECKING:
    from services.embedding.offline.onnx_export import Exported, OnnxPrecision, Source


@dataclass(frozen=True, slots=True)
class TritonTarget:
    """How a Triton server is to run the model. *name* None is the model's own, with the precision if that is int8."""

    name: str | None
    max_batch_size: int
    max_queue_delay_us: int
    device: Literal["cpu", "cuda"]
    instances: int


def triton_name(model: str, precision: "OnnxPrecision") -> str:
    """Return what *model* is called in a repository: its short name, of letters that a folder and a URL can have."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
    return f"{short}-int8" if precision == "int8" else short


def export_onnx(
    model: str, options: EncoderOptions, out: Path, *, precision: "OnnxPrecision", opset: int | None, force: bool
) -> tuple["Source", "Exported", Path]:
    """
    Write `model.onnx`, the tokenizer's files, `config.json` and `tercet_export.json` into *out*; return its path last.

    Raises:
        ModelNotFound: There is no such model.
        OfflineError: It cannot be exported, differs from torch, or *out* is taken.
    """
    check_free(out, force=force)
    source = _begin(model, options, precision)
    from services.embedding.offline.onnx_export import write_onnx, write_record, write_tokenizer

    with new_directory(out, force=force) as made:
        exported = write_onnx(source, made, precision=precision, opset=opset)
        write_tokenizer(source, made)
        write_record(source, exported, made)
    return source, exported, out


def export_triton(
    model: str,
    options: EncoderOptions,
    repository: Path,
    target: TritonTarget,
    *,
    precision: "OnnxPrecision",
    opset: int | None,
    force: bool,
) -> tuple["Source", "Exported", Path]:
    """
    Write a model into *repository*, which may have others; return its folder last.

    Beside the version's folder are `config.pbtxt`, `tercet_export.json` and the folder `tokenizer`, which the server
    passes over and callers need.

    Raises:
        ModelNotFound: There is no such model.
        OfflineError: It cannot be exported, differs from torch, or its folder is taken.
    """
    name = target.name or triton_name(model, precision)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise OfflineError(f"{name!r} is no name for a model: letters, digits, points, dashes and underscores")
    place = repository / name
    check_free(place, force=force)
    source = _begin(model, options, precision)
    from services.embedding.offline.onnx_export import write_onnx, write_record, write_tokenizer
    from services.embedding.offline.triton import VERSION, TritonOptions, write_config

    with new_directory(place, force=force) as made:
        version = made / VERSION
        version.mkdir()
        exported = write_onnx(source, version, precision=precision, opset=opset)
        parameters = {
            "source": source.description.name,
            "fingerprint": exported.fingerprint,
            "max_tokens": str(source.description.max_tokens),
            "pooling": source.description.pooling,
        }
        write_config(
            exported.file,
            made,
            name,
            TritonOptions(
                target.max_batch_size, target.max_queue_delay_us, target.device, target.instances, parameters
            ),
        )
        write_tokenizer(source, made / "tokenizer")
        write_record(source, exported, made)
    return source, exported, place


def _begin(model: str, options: EncoderOptions, precision: "OnnxPrecision") -> "Source":
    say(f"exporting {model} at {precision}: half a minute for a small model")
    # Imported here and below: torch takes seconds, and what is asked may be impossible.
    from services.embedding.offline.onnx_export import load_source

    return load_source(model, options)
