"""Which backends serve a model, and what they will take in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.common.model_errors import ModelNotFound
from services.common.model_files import FAKE_MODEL, PACKAGED, resolve_model
from services.embedding.ports import Backend
from services.embedding.settings import EmbeddingSettings
from services.embedding.specs import ModelSpec, parse_specs

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def load_backends(spec: ModelSpec, settings: EmbeddingSettings) -> list[Backend]:
    """
    Load the model *spec*, once for each device it is to run on. Takes seconds: call it in a thread.

    Raises:
        ModelNotFound: There is no such model.
    """
    return [_load(spec, settings, device) for device in _devices(spec, settings)]


def load_backend(settings: EmbeddingSettings) -> Backend:
    """Load the first model that *settings* name, on one device. As `load_backends`."""
    return load_backends(parse_specs(settings.model)[0], settings)[0]


def _load(spec: ModelSpec, settings: EmbeddingSettings, device: str) -> Backend:
    # Imported where they are used: torch takes seconds that the fake model does not need.
    if spec.name == FAKE_MODEL:
        from services.embedding.backends.fake import FakeBackend

        return FakeBackend()
    from services.common.encoders import EncoderOptions
    from services.embedding.backends.transformer import TransformerBackend

    options: dict[str, Any] = {"device": device} | {
        key: spec.options.get(key, getattr(settings, key)) for key in ("pooling", "precision", "runtime")
    }
    max_tokens = spec.options.get("max_tokens", settings.max_tokens)
    projection = spec.options.get("projection", settings.projection)
    return TransformerBackend(
        spec.name,
        EncoderOptions(
            measure_apart=True,
            **options,
            revision=spec.revision or settings.model_revision,
            max_tokens=int(max_tokens) if max_tokens else None,
            projection=Path(projection) if projection else None,
            trust_remote_code=settings.trust_remote_code,
            cache_dir=settings.model_cache_dir,
            threads=settings.inference_threads,
        ),
    )


def estimate_bytes(spec: ModelSpec, settings: EmbeddingSettings) -> int:
    """Return how much memory the weights of *spec* will take, from the files that are here; 0 where none are yet."""
    return _file_bytes(spec) * len(_devices(spec, settings))


def _devices(spec: ModelSpec, settings: EmbeddingSettings) -> list[str]:
    return spec.options.get("device", settings.device).split("+")


def _file_bytes(spec: ModelSpec) -> int:
    if spec.name == FAKE_MODEL:
        return 0
    if spec.name not in PACKAGED and not Path(spec.name).expanduser().is_dir():
        directory = _in_hub_cache(spec)
    else:
        try:
            directory = resolve_model(spec.name)
        except ModelNotFound:  # Loading will say it better.
            directory = None
    return sum(file.stat().st_size for file in _weight_files(directory)) if directory else 0


def _weight_files(directory: Path) -> Iterator[Path]:
    """Yield the files of the first format that there is: a second one holds the same weights."""
    for pattern in _WEIGHTS:
        files = [file for file in directory.rglob(pattern) if file.is_file()]
        if files:
            yield from files
            return


def _in_hub_cache(spec: ModelSpec) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec.name, revision=spec.revision, local_files_only=True))
    except Exception:  # Not here yet, or no hub id: its size is known when it is.
        return None
