"""The rerank service's settings, read from RERANK_* variables."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.model_files import DEFAULT_MODEL
from services.common.settings import ModelServiceSettings

LATE_INTERACTION = "late-interaction/"


class RerankSettings(ModelServiceSettings):
    """See docs/settings.md for the list with defaults."""

    model_config = SettingsConfigDict(env_prefix="RERANK_")

    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8002, description="Port to listen on; 0 picks one."
    )
    model: str = Field(
        default=f"{LATE_INTERACTION}{DEFAULT_MODEL}",
        min_length=1,
        description="`late-interaction/` and an embedding model, or a CrossEncoder's directory or hub id, or `fake`.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="`auto`: late interaction takes the fastest that stays within cosine 0.999 of fp32, never `int8`; "
        "a cross-encoder takes fp32, and knows no `int8`.",
    )
    max_tokens: Annotated[int, Field(ge=32, le=32_768)] = Field(
        default=256, description="Documents are cut to this many tokens (less if the model reads less)."
    )
    token_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=512 * 1024 * 1024, description="Memory for token vectors of documents seen before (late interaction)."
    )
    max_batch_tokens: Annotated[int, Field(ge=512)] = Field(
        default=2048,
        description="Most tokens, padding included, computed at once: deadlines are met to within a batch.",
    )
    max_queue_items: Annotated[int, Field(ge=1000)] = Field(
        default=4000, description="Pairs waiting in each lane; beyond it callers get 429."
    )
