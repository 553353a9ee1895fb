"""The rerank service's settings, read from RERANK_* variables."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.model_files import DEFAULT_RERANKER
from services.common.settings import ModelServiceSettings

LATE_INTERACTION = "late-interaction/"
AUTO = "auto"
NONE = "none"  # A word, since an empty variable stands for its default.


class RerankSettings(ModelServiceSettings):
    """See docs/settings.md for the list with defaults."""

    model_config = SettingsConfigDict(env_prefix="RERANK_")

    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8002, description="Port to listen on; 0 picks one."
    )
    model: str = Field(
        default=DEFAULT_RERANKER,
        min_length=1,
        description="The packaged `tercet-reranker`; `late-interaction/` and an embedding model; a directory or hub id of a "
        "CrossEncoder, of a model with a sequence-classification head or of a decoder in the Qwen3-Reranker form; or "
        "`fake`.",
    )
    first_stage: str = Field(
        default=AUTO,
        min_length=1,
        description="A second scorer, named alike, that scores all documents first (`late-interaction/` and an embedding "
        "model, say): the model then takes the best of those, best first, as time allows. `auto`: the one that the model "
        "was fitted with, where the package has it, as for the default model. `none`: the model scores all.",
    )
    last_stage_documents: Annotated[int, Field(ge=1)] = Field(
        default=10, description="After a first stage the model scores so many documents of a request, the best ones."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="`auto`: the fastest measured here that stays next to fp32 (late interaction: within cosine 0.999), "
        "never `int8`.",
    )
    max_tokens: Annotated[int, Field(ge=32, le=32_768)] = Field(
        default=256,
        description="Query and document are read side by side in at most this many tokens (less if the model reads less); "
        "a longer document is read in parts.",
    )
    long_documents: Literal["windows", "first"] = Field(
        default="windows",
        description="What is read of a document that does not fit beside the query: `windows` all of it in overlapping "
        "parts, of which the best counts; `first` the first part.",
    )
    window_overlap_tokens: Annotated[int, Field(ge=0)] = Field(
        default=32, description="Tokens that neighbouring parts of a document share, half a part at most."
    )
    max_windows: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=16, description="Most parts of a document that are scored; what comes after them is not read."
    )
    token_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=512 * 1024 * 1024, description="Memory for token vectors of documents seen before (late interaction)."
    )
    token_vector_dimensions: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Dimensions kept of each token vector (late interaction): fewer take less memory and rank a little "
        "worse. 0: all.",
    )
    tokenized_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=64 * 1024 * 1024,
        description="Memory for the tokens of documents seen before; of each of two scorers half.",
    )
    score_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=64 * 1024 * 1024,
        description="Memory for scores of pairs seen before. 0: none are kept, in Redis neither.",
    )
    cache_ttl_s: Annotated[float, Field(gt=0)] = Field(
        default=86_400.0, description="Scores and token vectors stay in Redis for this long."
    )
    max_batch_tokens: Annotated[int, Field(ge=512)] = Field(
        default=2048,
        description="Most tokens, padding included, computed at once: deadlines are met to within a batch.",
    )
    max_queue_items: Annotated[int, Field(ge=1000)] = Field(
        default=4000, description="Documents waiting in each lane; beyond it callers get 429."
    )
