"""What the routes work with."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from services.common.app import resources_of
from services.embedding.registry import ModelRegistry
from services.embedding.settings import EmbeddingSettings


@dataclass(frozen=True, slots=True)
class EmbeddingResources:
    """The models, and the settings that replies tell of."""

    models: ModelRegistry
    settings: EmbeddingSettings

    def problems(self) -> Sequence[str]:
        """Return why this process should be replaced."""
        return self.models.problems()


def embedding_of(request: Request) -> EmbeddingResources:
    """Return the resources of the service that *request* came to. Raises NotReady before they are built."""
    resources = resources_of(request)
    assert isinstance(resources, EmbeddingResources)
    return resources


def models_of(request: Request) -> ModelRegistry:
    """Return the models of the service that *request* came to. Raises NotReady before they are built."""
    return embedding_of(request).models
