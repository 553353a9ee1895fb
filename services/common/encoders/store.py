"""What earlier starts found out, on disk: a model's description, its tokenizer, and what computes it best here."""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import structlog
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from services.common.encoders.hardware import processor, usable_cores
from services.common.encoders.protocol import EncoderOptions

log = structlog.get_logger(__name__)

_FORMAT = 2
MEASURING_PATIENCE_S = 300.0
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "openvino", "numpy")


class Description(Protocol):
    """
    What a model is.

    *digest* changes with anything that may change what it computes; *dim* is how many numbers it gives for a sample.
    """

    @property
    def digest(self) -> str:
        """See the class."""
        ...

    @property
    def dim(self) -> int:
        """See the class."""
        ...

    def to_json(self) -> str:
        """Return it as JSON."""
        ...


DescriptionT = TypeVar("DescriptionT", bound=Description)
TokenizerT = TypeVar("TokenizerT")


@dataclass(frozen=True, slots=True)
class Choice:
    """
    What computes a model on this machine, and why.

    *golden* has fp32's outputs for a few short samples, float32 [n, dim]; at each start the nearness of the runtime's
    own to them must be *floor* at least.
    """

    runtime: str
    precision: str
    autocast: bool
    reason: str
    measured: Mapping[str, Mapping[str, float]]
    golden: NDArray[np.float32]
    floor: float


@dataclass(frozen=True, slots=True)
class Kept(Generic[DescriptionT, TokenizerT]):
    """A model as it was found at an earlier start; *tokenizer* is None where it needs transformers."""

    description: DescriptionT
    tokenizer: TokenizerT | None
    choice: Choice


def choice_key(digest: str, variant: str, options: EncoderOptions, device: str) -> str:
    """Return a name that changes with anything that may change the model's description or the choice."""
    parts = {
        "format": _FORMAT,
        "digest": digest,
        "variant": variant,
        "max_tokens": options.max_tokens,
        "trust_remote_code": options.trust_remote_code,
        "asked": [options.runtime, options.precision],
        "device": device,
        "threads": options.threads or usable_cores(),
        "processor": processor().key,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


class EncoderStore:
    """The directory *cache_dir*. Losing it, in part or whole, costs a measurement and never an error."""

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir

    def load(
        self,
        key: str,
        read_description: Callable[[str], DescriptionT],
        read_tokenizer: Callable[[str, DescriptionT], TokenizerT],
    ) -> Kept[DescriptionT, TokenizerT] | None:
        """
        Return what is kept under *key*; None where there is nothing or it is damaged.

        The two functions raise ValueError for what was not written by this version.
        """
        try:
            values = json.loads(self._choice_file(key).read_bytes())
            description = read_description(values["description"])
            choice = _choice_of(values["choice"], description.dim)
            digest = values["tokenizer"]
            tokenizer = None if digest is None else read_tokenizer(self._tokenizer_json(digest), description)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("kept_choice_is_damaged", file=str(self._choice_file(key)), error=str(error))
            return None
        return Kept(description, tokenizer, choice)

    def _tokenizer_json(self, digest: str) -> str:
        content = self._tokenizer_file(digest).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("the kept tokenizer has changed")
        return content.decode()

    def save(self, key: str, description: Description, tokenizer_json: str | None, choice: Choice) -> None:
        """Keep these; a directory that cannot be written to is logged."""
        digest = None
        try:
            if tokenizer_json is not None:
                content = tokenizer_json.encode()
                digest = hashlib.sha256(content).hexdigest()
                _write(self._tokenizer_file(digest), content)
            values = {"description": description.to_json(), "tokenizer": digest, "choice": _values_of(choice)}
            _write(self._choice_file(key), json.dumps(values, ensure_ascii=False).encode())
        except OSError as error:
            log.warning("choice_not_kept", directory=str(self.cache_dir), error=str(error))

    @contextmanager
    def measuring(self, key: str) -> Iterator[None]:
        """Hold the right to measure for *key*; a directory that cannot be written to, or a stuck holder, grants it."""
        lock = FileLock(self._choice_file(key).with_suffix(".lock"), timeout=MEASURING_PATIENCE_S)
        try:
            self._choice_file(key).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, Timeout) as error:
            log.warning("measuring_without_lock", error=str(error))
        try:
            yield
        finally:
            lock.release()

    def _choice_file(self, key: str) -> Path:
        return self.cache_dir / "choices" / f"{key}.json"

    def _tokenizer_file(self, digest: str) -> Path:
        return self.cache_dir / "tokenizers" / f"{digest}.json"


def _values_of(choice: Choice) -> dict[str, Any]:
    return {
        "runtime": choice.runtime,
        "precision": choice.precision,
        "autocast": choice.autocast,
        "reason": choice.reason,
        "measured": {name: dict(figures) for name, figures in choice.measured.items()},
        "golden": base64.b64encode(choice.golden.astype("<f4").tobytes()).decode(),
        "floor": choice.floor,
    }


def _choice_of(values: Mapping[str, Any], dim: int) -> Choice:
    golden = np.frombuffer(base64.b64decode(values["golden"]), dtype="<f4").reshape(-1, dim).astype(np.float32)
    measured = {
        str(name): {str(key): float(value) for key, value in figures.items()}
        for name, figures in dict(values["measured"]).items()
    }
    if values["runtime"] not in ("torch", "openvino"):
        raise ValueError(f"unknown runtime {values['runtime']}")
    return Choice(
        str(values["runtime"]),
        str(values["precision"]),
        bool(values["autocast"]),
        str(values["reason"]),
        measured,
        golden,
        float(values["floor"]),
    )


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, made = tempfile.mkstemp(prefix=".making-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(made, file)
    except BaseException:
        os.unlink(made)
        raise
