"""Which backend serves a model's name."""

from services.common.encoders import EncoderOptions
from services.common.model_files import FAKE_MODEL
from services.rerank.ports import Backend
from services.rerank.settings import LATE_INTERACTION, RerankSettings


def load_backend(settings: RerankSettings) -> Backend:
    """
    Load the scorer that *settings* name. Takes seconds: call it in a thread.

    Raises:
        ModelNotFound: There is no such model, or its head cannot score pairs.
    """
    # Imported where they are used: torch takes seconds that the fake model does not need.
    if settings.model == FAKE_MODEL:
        from services.rerank.backends.fake import FakeBackend

        return FakeBackend()
    if settings.model.startswith(LATE_INTERACTION):
        from services.rerank.backends.late_interaction import LateInteractionBackend

        return LateInteractionBackend(
            settings.model.removeprefix(LATE_INTERACTION),
            EncoderOptions(
                measure_apart=True,
                revision=settings.model_revision,
                device=settings.device,
                precision=settings.precision,
                runtime=settings.runtime,
                cache_dir=settings.model_cache_dir,
                threads=settings.inference_threads,
            ),
            cache_bytes=settings.token_cache_bytes,
            max_tokens=settings.max_tokens,
        )
    from services.rerank.backends.cross_encoder import CrossEncoderBackend

    return CrossEncoderBackend(
        settings.model,
        revision=settings.model_revision,
        precision=settings.precision,
        device=settings.device,
        threads=settings.inference_threads,
        max_tokens=settings.max_tokens,
    )
