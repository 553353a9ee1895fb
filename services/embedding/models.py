"""Which backend serves a model's name."""

from services.common.model_files import FAKE_MODEL
from services.embedding.ports import Backend
from services.embedding.settings import EmbeddingSettings


def load_backend(settings: EmbeddingSettings) -> Backend:
    """
    Load the model that *settings* name. Takes seconds: call it in a thread.

    Raises:
        ModelNotFound: There is no such model.
    """
    # Imported where they are used: torch takes seconds that the fake model does not need.
    if settings.model == FAKE_MODEL:
        from services.embedding.backends.fake import FakeBackend

        return FakeBackend()
    from services.embedding.backends.transformer import TransformerBackend

    return TransformerBackend(
        settings.model, revision=settings.model_revision, precision=settings.precision, device=settings.device
    )
