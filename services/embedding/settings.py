"""The embedding service's settings, read from EMBEDDING_* variables."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from services.common.model_files import DEFAULT_MODEL
from services.common.settings import ModelServiceSettings
from services.embedding.specs import parse_specs


class EmbeddingSettings(ModelServiceSettings):
    """See docs/settings.md for the list with defaults."""

    model_config = SettingsConfigDict(env_prefix="EMBEDDING_")

    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8001, description="Port to listen on; 0 picks one."
    )
    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="One model or several, separated by commas: `[alias=]name[@revision][;key=value]`, where the name is a "
        "directory, a hub id, the packaged default or `fake`, and the keys are `device`, `dimensions` (`any`: cut to any "
        "size), `max_tokens`, `pinned`, `pooling`, `precision`, `projection` and `runtime`. The first is the default; "
        "the others are loaded when they are asked for. `--model` on the command line says the same.",
    )
    device: Literal["auto", "cpu", "cuda", "mps", "cpu+cuda"] = Field(  # type: ignore[assignment]
        default="auto",
        description="Where models run; `cpu+cuda`: on both, each request where it is predicted to be done first.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="`auto`: the fastest measured here that stays within cosine 0.999 of fp32; never int8.",
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        default="auto", description="What runs the model; `auto`: the faster one measured here."
    )
    pooling: Literal["cls", "mean", "lasttoken", "weightedmean", "max"] | None = Field(
        default=None, description="How token vectors become one; the model's own modules say when unset."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Longer texts are cut to this; unset: the model's own limit. Not above the positions that it has.",
    )
    projection: Path | None = Field(
        default=None, description="A projection that `tercet fit-pca` wrote, applied to every vector."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with a model's files. Only for models you trust as code."
    )
    model_cache_dir: Path | None = Field(
        default=None, description="Where converted models and measurements are kept; ~/.cache/tercet when unset."
    )
    model_memory_bytes: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Most bytes of weights in memory: the least recently used model goes first, pinned ones stay. 0: no limit.",
    )
    idle_unload_s: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="A model that nobody used for this long is unloaded, unless it is pinned. 0: never."
    )
    pin_default: bool = Field(
        default=True,
        description="Load the default model at the start and keep it; false: load it when it is asked for.",
    )
    max_concurrent_requests: Annotated[int, Field(ge=1)] = Field(
        default=2048, description="Requests under way at once; beyond it callers get 429."
    )
    max_client_batch: Annotated[int, Field(ge=1, le=2048)] = Field(
        default=2048, description="Most inputs in one request; more are refused with 413."
    )
    auto_truncate: bool = Field(
        default=True,
        description="What becomes of a text over the model's limit when the request does not say, on every route: "
        "true cuts it, false refuses it.",
    )
    max_batch_tokens: Annotated[int, Field(ge=512)] = Field(
        default=2048,
        description="Most tokens, padding included, that the model computes at once; a query waits for at most one such batch.",
    )
    max_batch_items: Annotated[int, Field(ge=1)] = Field(
        default=128, description="Most texts that the model computes at once."
    )
    sort_window: Annotated[int, Field(ge=1)] = Field(
        default=512, description="Batches are made of texts of like length among this many that wait."
    )
    max_queue_items: Annotated[int, Field(ge=2048)] = Field(
        default=8192, description="Texts waiting in each lane; beyond it callers get 429."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=64 * 1024 * 1024,
        description="Memory for vectors of texts seen before, when REDIS_URL is unset. 0: no cache, in Redis neither.",
    )
    cache_ttl_s: Annotated[float, Field(gt=0)] = Field(
        default=86_400.0, description="A cached vector is used for this long."
    )

    @field_validator("model")
    @classmethod
    def _specs_can_be_read(cls, value: str) -> str:
        parse_specs(value)
        return value
