"""The search service's settings, read from SEARCH_* variables and REDIS_URL."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from services.common.settings import ServiceSettings
from services.common.wire.base import CollectionName


class SearchSettings(ServiceSettings):
    """See docs/settings.md for the list with defaults."""

    model_config = SettingsConfigDict(env_prefix="SEARCH_")

    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="Port to listen on; 0 picks one."
    )
    data_dir: Path = Field(default=Path(".tercet/search"), description="Where the ledger and the shards live.")
    embedding_url: str = Field(default="http://127.0.0.1:8001", description="The embedding service.")
    rerank_url: str = Field(default="http://127.0.0.1:8002", description="The rerank service.")
    peer_api_key: SecretStr | None = Field(
        default=None, description="The API key that is sent to the embedding and rerank services."
    )
    default_collection: CollectionName = Field(
        default="default", description="The collection of a search that names none."
    )
    default_shards: Annotated[int, Field(ge=1, le=256)] = Field(default=2, description="Shards of a new collection.")
    search_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        default=2, description="Shard searches that run at once; one thread each."
    )
    follow_interval_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="How often shards look at the ledger when nobody told them of a write."
    )
    default_timeout_ms: Annotated[int, Field(ge=10)] = Field(
        default=3000, description="Time for a search that sets no timeout_ms."
    )
    write_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="Time for a write, embedding included, when the caller sets no deadline."
    )
    candidates: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=100, description="Candidates that each retriever proposes, unless the search says."
    )
    rerank_candidates: Annotated[int, Field(ge=1, le=200)] = Field(
        default=30, description="Fused candidates that are reranked, unless the search says."
    )
    dense_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.65, description="Share of the dense score in `standardized` fusion; BM25 has the rest."
    )
    rerank_blend: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.75, description="Share of the rerank score in the last order; the fused score has the rest."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=64 * 1024 * 1024, description="Memory for results cached in this process; 0 keeps none."
    )
    cache_ttl_s: Annotated[float, Field(gt=0)] = Field(default=300.0, description="Cached results live this long.")
