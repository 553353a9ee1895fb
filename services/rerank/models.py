"""Which backends serve the models that the settings name, and how two of them blend."""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import structlog

from services.common.encoders import EncoderOptions
from services.common.model_errors import InvalidModel
from services.common.model_files import FAKE_MODEL, PACKAGED, resolve_model
from services.rerank.cascade import FittedBlend
from services.rerank.ports import Backend, ScorerInfo
from services.rerank.settings import AUTO, LATE_INTERACTION, NONE, RerankSettings

log = structlog.get_logger(__name__)

BLEND_FILE = "cascade.json"


def load_backends(settings: RerankSettings) -> list[Backend]:
    """
    Load the scorer that *settings* name, or the cascade's two, the last one last. Takes seconds: call it in a thread.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: Its head cannot score as it is asked to; the message says which kinds work.
    """
    first = first_stage(settings)
    names = [first, settings.model] if first else [settings.model]
    backends: list[Backend] = []
    try:
        for name in names:
            backends.append(_load(name, settings))
        check_cascade([backend.info for backend in backends])
    except BaseException:
        for backend in backends:
            backend.close()
        raise
    return backends


def first_stage(settings: RerankSettings) -> str:
    """
    Return the name of the cascade's first scorer, empty where the model stands alone.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: A file that says what the model was fitted with cannot be read.
    """
    if settings.first_stage != AUTO:
        return "" if settings.first_stage == NONE else settings.first_stage
    file = _blend_file(settings)
    if file is None:
        return ""
    name = str(_read_blend(file).get("first_stage"))
    if name.startswith(LATE_INTERACTION) and name.removeprefix(LATE_INTERACTION) in PACKAGED:
        return name
    log.warning("first_stage_is_not_packaged", model=settings.model, fitted_with=name, set="RERANK_FIRST_STAGE")
    return ""


def check_cascade(infos: Sequence[ScorerInfo]) -> None:
    """
    Do nothing if the scorers of *infos*, one or a cascade's, can do together what is asked of them.

    Raises:
        InvalidModel: One of several cannot rank.
    """
    for info in infos if len(infos) > 1 else ():
        if not info.ranks:
            raise InvalidModel(
                f"{info.name} tells {len(info.labels)} labels apart, which says nothing about relevance: in a cascade a "
                "model with one or two labels, a decoder that says yes or no, or late interaction works"
            )


def load_blend(settings: RerankSettings, first: ScorerInfo) -> FittedBlend | None:
    """
    Return the constants that came with the cascade's model for its *first* scorer; None if there are none, or for another one.

    Raises:
        InvalidModel: The file cannot be read.
    """
    file = _blend_file(settings)
    if file is None:
        log.warning("cascade_has_no_constants", model=settings.model)
        return None
    read = _read_blend(file)
    fingerprint = read.get("fingerprint")
    # It names the first scorer's weights, which are a part of that scorer's own fingerprint.
    if read.get("first_stage") != first.name or not fingerprint or str(fingerprint) not in first.fingerprint:
        wanted = f"{read.get('first_stage')}, {fingerprint}"
        log.warning("cascade_constants_are_for_another", wanted=wanted, used=f"{first.name}, {first.fingerprint}")
        return None
    a, b, c = _numbers(read, "both", 3, file)
    d, e = _numbers(read, "first", 2, file)
    return FittedBlend((a, b, c), (d, e))


def _blend_file(settings: RerankSettings) -> Path | None:
    """Return the file with the constants that came with the model, if there is one."""
    if settings.model == FAKE_MODEL or settings.model.startswith(LATE_INTERACTION):
        return None
    file = resolve_model(settings.model, revision=settings.model_revision) / BLEND_FILE
    return file if file.is_file() else None


def _read_blend(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{file} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise InvalidModel(f"{file} is no JSON object")
    return read


def _numbers(read: dict[str, Any], name: str, count: int, file: Path) -> Sequence[float]:
    values = read.get(name)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, int | float) and isfinite(value) for value in values)
    ):
        raise InvalidModel(f"{file}: {name} must be {count} numbers, not {values!r}")
    return [float(value) for value in values]


def _load(name: str, settings: RerankSettings) -> Backend:
    # Imported where they are used: torch takes seconds that the fake model does not need.
    if name == FAKE_MODEL:
        from services.rerank.backends.fake import FakeBackend

        return FakeBackend(settings.max_tokens)
    options = EncoderOptions(
        measure_apart=True,
        # The setting is about the model, not about the first stage.
        revision=settings.model_revision if name == settings.model else None,
        device=settings.device,
        precision=settings.precision,
        runtime=settings.runtime,
        cache_dir=settings.model_cache_dir,
        threads=settings.inference_threads,
    )
    if name.startswith(LATE_INTERACTION):
        from services.rerank.backends.late_interaction import LateInteractionBackend

        return LateInteractionBackend(
            name.removeprefix(LATE_INTERACTION),
            options,
            cache_bytes=settings.token_cache_bytes,
            max_tokens=settings.max_tokens,
            dimensions=settings.token_vector_dimensions,
        )
    from services.rerank.backends.cross_encoder import open_cross_encoder

    return open_cross_encoder(name, options, max_tokens=settings.max_tokens)
