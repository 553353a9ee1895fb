"""The embedding service's settings, read from EMBEDDING_* variables."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.model_files import DEFAULT_MODEL
from services.common.settings import ModelServiceSettings


class EmbeddingSettings(ModelServiceSettings):
    """See docs/settings.md for the list with defaults."""

    model_config = SettingsConfigDict(env_prefix="EMBEDDING_")

    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8001, description="Port to listen on; 0 picks one."
    )
    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="A sentence-transformers model: a directory, a hub id, the packaged default, or `fake`.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="`auto`: bf16 where the processor has it and it stays within cosine 0.999 of fp32."
    )
    max_batch_tokens: Annotated[int, Field(ge=512)] = Field(
        default=2048,
        description="Most tokens, padding included, that the model computes at once; a query waits for at most one such batch.",
    )
    max_queue_items: Annotated[int, Field(ge=2048)] = Field(
        default=8192, description="Texts waiting in each lane; beyond it callers get 429."
    )
