"""
Models that ship without weights which another model on the machine already has: made whole when they are first used.

Such a directory has a `completion.json`: the file with its own weights, the name that the whole weights get, and for
each tensor that is taken over the model it comes from, its name there and a checksum of its bytes. What is made is a
plain directory that any library loads.
"""

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from services.common.model_errors import InvalidModel

log = structlog.get_logger(__name__)

COMPLETION_FILE = "completion.json"
_FORMAT = 1
_PLAIN = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}


def completed(directory: Path, resolve: Callable[[str], Path], *, cache_dir: Path) -> Path:
    """
    Return a directory with the whole model of *directory*: itself where nothing is missing, else one in *cache_dir*.

    The first time it is made (a second), whole or not at all; its name changes with the content of both models. Where
    *cache_dir* cannot be written to, it is made for this process alone. *resolve* finds a model by its name.

    Raises:
        InvalidModel: A file is missing or damaged, or the other model is not the one that was trained with.
        ModelNotFound: There is no such other model.
    """
    if not (directory / COMPLETION_FILE).is_file():
        return directory
    plan = _Plan(directory, resolve)
    place = cache_dir / "models" / f"{directory.name}-{plan.digest}"
    if plan.is_made(place):
        return place
    try:
        _make_kept(plan, place)
    except OSError as error:
        own = Path(tempfile.mkdtemp(prefix="tercet-model-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        log.warning("completed_model_not_kept", directory=str(place.parent), error=str(error))
        plan.make(own)
        return own
    return place


def _make_kept(plan: "_Plan", place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    try:
        plan.make(made)
        made.chmod(0o755)
        try:
            made.replace(place)
        except OSError:  # Another process was faster, or what is there lacks something.
            if not plan.is_made(place):
                shutil.rmtree(place, ignore_errors=True)
                made.replace(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _Plan:
    """What has to be put together."""

    def __init__(self, directory: Path, resolve: Callable[[str], Path]) -> None:
        self._directory = directory
        try:
            content = (directory / COMPLETION_FILE).read_bytes()
            values = json.loads(content)
            self._weights, self._whole = str(values["weights"]), str(values["whole"])
            self._taken: dict[str, dict[str, str]] = dict(values["taken"])
            self._sources = {name: resolve(taken["model"]) for name, taken in self._taken.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidModel(f"{directory / COMPLETION_FILE} cannot be used: {error!r}") from error
        self._files = [
            file.relative_to(directory)
            for file in sorted(directory.rglob("*"))
            if file.is_file() and not self._own(file)
        ]
        digest = hashlib.sha256(f"{_FORMAT}/".encode() + content)
        for relative in [*self._files, Path(self._weights)]:
            digest.update(relative.as_posix().encode() + b"\0")
            digest.update(self._read(relative))
        self.digest = digest.hexdigest()[:32]

    def is_made(self, place: Path) -> bool:
        """Say whether *place* has every file."""
        return all((place / relative).is_file() for relative in [*self._files, Path(self._whole)])

    def make(self, place: Path) -> None:
        """Write the whole model to *place*, all weights as float32: what bf16 holds is exact in it."""
        from safetensors import SafetensorError, deserialize, safe_open
        from safetensors.numpy import save_file

        for relative in self._files:
            target = place / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._read(relative))
        try:
            tensors = {name: _array(tensor) for name, tensor in deserialize(self._read(Path(self._weights)))}  # type: ignore[no-untyped-call]
        except (SafetensorError, ValueError) as error:
            raise InvalidModel(f"{self._directory / self._weights} is damaged: {error}") from error
        for name, taken in self._taken.items():
            source = self._sources[name] / "model.safetensors"
            try:
                with safe_open(source, framework="numpy") as opened:
                    tensor = opened.get_tensor(taken["tensor"])
            except (OSError, SafetensorError) as error:
                raise InvalidModel(f"{source} does not give {taken['tensor']}: {error}") from error
            if hashlib.sha256(tensor.tobytes()).hexdigest() != taken["sha256"]:
                raise InvalidModel(f"{taken['tensor']} of {source} is not what {self._directory} was trained with")
            tensors[name] = tensor
        save_file(tensors, place / self._whole, metadata={"format": "pt"})

    def _own(self, file: Path) -> bool:
        return file in (self._directory / COMPLETION_FILE, self._directory / self._weights)

    def _read(self, relative: Path) -> bytes:
        try:
            return (self._directory / relative).read_bytes()
        except OSError as error:
            raise InvalidModel(f"{self._directory / relative} cannot be read: {error}") from error


def _array(tensor: dict[str, Any]) -> NDArray[Any]:
    """Return a tensor of a safetensors file as an array; numpy has no bf16, whose bits are float32's upper half."""
    kind, shape, data = tensor["dtype"], tensor["shape"], tensor["data"]
    if kind == "BF16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if kind not in _PLAIN:
        raise ValueError(f"weights of type {kind} are not known")
    return np.frombuffer(data, _PLAIN[kind]).reshape(shape)
