"""The search service's settings, read from SEARCH_* variables and REDIS_URL."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.settings import ServiceSettings
from services.common.wire.base import CollectionName

NODE_PORT = 8010


class SearchSettings(ServiceSettings):
    """See docs/settings.md for the list with defaults."""

    model_config = SettingsConfigDict(env_prefix="SEARCH_")

    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="Port to listen on; 0 picks one. Shard and fallback nodes listen on 8010 by default."
    )
    data_dir: Path = Field(default=Path(".tercet/search"), description="Where the ledger and the shards live.")
    role: Literal["all", "router", "shard", "fallback"] = Field(
        default="all",
        description="What this process is: `all`, the whole search service; `router`, the service without shards of its "
        "own; `shard`, a node that hosts a part of the shards for routers; `fallback`, a node with the fallback index.",
    )
    ledger_url: SecretStr | None = Field(
        default=None,
        description="The PostgreSQL database that is the ledger, as postgresql://user:password@host/name; a SQLite file "
        "in the data directory when unset, which only the role `all` can use.",
    )
    shard_nodes: str = Field(
        default="",
        description="Where a router finds the shard nodes, in the order of their numbers: `;` between nodes, `,` between "
        "the replicas of one, as in http://a:8010,http://a2:8010;http://b:8010. A name with several addresses is as many "
        "replicas.",
    )
    shard_node: Annotated[int, Field(ge=0)] = Field(default=0, description="Which of the shard nodes this is, from 0.")
    shard_node_count: Annotated[int, Field(ge=1)] = Field(
        default=1, description="How many shard nodes there are; node i of n hosts the shards s with s mod n = i."
    )
    node_api_key: SecretStr | None = Field(
        default=None, description="The API key that is sent to shard and fallback nodes; the peers' key when unset."
    )
    hedge_reads: bool = Field(
        default=True,
        description="Whether a router asks a second replica too when a shard takes longer to answer than 95 of 100 times "
        "before: at most one read in ten.",
    )
    fallback: Annotated[str, Field(pattern=r"^(off|local|https?://[^/]+/?)$")] = Field(
        default="off",
        description="The fallback index, which answers for shards that no replica answers for: `off`; `local`, in this "
        "process; or the URL of a node with the role `fallback`.",
    )
    embedding_url: str = Field(default="http://127.0.0.1:8001", description="The embedding service.")
    embedding_bulk_url: str | None = Field(
        default=None,
        description="Another address of it for documents and other large batches, such as a pool with GPUs; while that "
        "does not answer they go to the first. Unset: the same.",
    )
    rerank_url: str = Field(default="http://127.0.0.1:8002", description="The rerank service.")
    peer_api_key: SecretStr | None = Field(
        default=None, description="The API key that is sent to the embedding and rerank services."
    )
    default_collection: CollectionName = Field(
        default="default", description="The collection of a search that names none."
    )
    default_shards: Annotated[int, Field(ge=1, le=256)] | None = Field(
        default=None,
        description="Shards of a new collection; when unset, one for each shard node, or one where all are in this process: "
        "a question costs about as much in half of the rows as in all of them.",
    )
    create_on_write: bool = Field(
        default=True, description="Whether the first write to a collection that is not there creates it."
    )
    search_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        default=2, description="Shard searches that run at once; one thread each."
    )
    write_threads: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Shards that take new operations at once; one thread each."
    )
    follow_interval_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="How often shards look at the ledger when nobody told them of a write."
    )
    snapshot_interval_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="A shard that changed writes a snapshot this long after its last one."
    )
    snapshot_operations: Annotated[int, Field(ge=1)] = Field(
        default=100_000, description="… or after this many operations."
    )
    idle_close_s: Annotated[float, Field(gt=0)] = Field(
        default=900.0,
        description="A collection that nobody used for so long is closed; the next search or write opens it. The fallback "
        "index keeps its collections open.",
    )
    max_open_collections: Annotated[int, Field(ge=1)] = Field(
        default=100, description="When more are open, the longest unused ones are closed."
    )
    maintenance_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of one CPU that building and merging of segments takes."
    )
    tail_rows: Annotated[int, Field(ge=1)] = Field(
        default=4096, description="Rows of a shard that are searched one by one before they are sealed into a segment."
    )
    hnsw_rows: Annotated[int, Field(ge=1)] = Field(
        default=16_384, description="A segment of at least this many rows is a graph (HNSW); a smaller one is flat."
    )
    ivf_rows: Annotated[int, Field(ge=1)] = Field(
        default=2_000_000, description="A segment of at least this many rows is an inverted file (IVF)."
    )
    max_segment_rows: Annotated[int, Field(ge=1)] = Field(
        default=8_000_000, description="Segments are not merged into larger ones than this many rows."
    )
    ef_search: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=96, description="How widely graphs are searched: more finds more and takes longer."
    )
    trim_after_s: Annotated[float, Field(gt=0)] = Field(
        default=86_400.0,
        description="A shared ledger forgets deletions after this time. A follower that was away for longer, with an "
        "older snapshot, builds its shards anew.",
    )
    default_timeout_ms: Annotated[int, Field(ge=10)] = Field(
        default=3000, description="Time for a search that sets no timeout_ms."
    )
    write_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="Time for a write, embedding included, when the caller sets no deadline."
    )
    embedding_max_calls: Annotated[int, Field(ge=1)] = Field(
        default=64,
        description="Calls to the embedding service under way at once; indexing uses three quarters of them at most.",
    )
    rerank_max_calls: Annotated[int, Field(ge=1)] = Field(
        default=16,
        description="Calls to the rerank service under way at once; a search that finds no place soon goes without.",
    )
    max_concurrent_searches: Annotated[float, Field(ge=1)] = Field(
        default=1024.0,
        description="Searches under way at once at most, counted in lexical ones, of which others are worth several; "
        "the limit in force follows how long searches take.",
    )
    max_waiting_searches: Annotated[int, Field(ge=0)] = Field(
        default=512, description="Searches that wait for their turn at most; the least urgent are turned away first."
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
        default=0.8, description="Share of the rerank score in the last order; the fused score has the rest."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=64 * 1024 * 1024,
        description="Memory for results cached in this process, with or without Redis; 0 keeps none.",
    )
    cache_entry_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=1024 * 1024, description="A larger result is not cached."
    )
    cache_ttl_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="A cached result is given again for so long, if it is still true."
    )
    stale_if_error_s: Annotated[float, Field(ge=0)] = Field(
        default=3600.0,
        description="When nothing can be searched, a cached result up to this age is given, flagged `stale`; 0 gives none.",
    )

    recall_sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01,
        description="Share of the searches whose recall is measured by an exact search in the background; 0 measures none.",
    )
    slow_search_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="A search over this is logged as `slow_search`, with its plan and where the time went."
    )
    log_queries: bool = Field(
        default=False, description="Whether that line has the question's words and the filter's values too."
    )

    @property
    def shards_of_a_new_collection(self) -> int:
        """`default_shards`, or what stands for it."""
        return self.default_shards or max(1, len(self.nodes()))

    def nodes(self) -> list[list[str]]:
        """Return the URLs of each shard node's replicas. Raises ValueError where they cannot be read."""
        if not self.shard_nodes:
            return []
        nodes = [[url.strip().rstrip("/") for url in node.split(",")] for node in self.shard_nodes.split(";")]
        for url in (url for node in nodes for url in node):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path:
                raise ValueError(f"SEARCH_SHARD_NODES: a node is written http://name:port, and not {url!r}")
        return nodes

    @model_validator(mode="before")
    @classmethod
    def _nodes_have_a_port_of_their_own(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") in ("shard", "fallback"):
            return {"listen_port": NODE_PORT, **given}
        return given

    @model_validator(mode="after")
    def _role_has_what_it_needs(self) -> Self:
        if self.role != "all" and self.ledger_url is None:
            raise ValueError(
                f"SEARCH_ROLE={self.role} needs SEARCH_LEDGER_URL: a SQLite ledger serves one process only"
            )
        if self.role == "router" and not self.nodes():
            raise ValueError("SEARCH_ROLE=router needs SEARCH_SHARD_NODES: where the shard nodes are")
        if self.role != "router" and self.shard_nodes:
            raise ValueError(f"SEARCH_SHARD_NODES is for SEARCH_ROLE=router, and the role is {self.role}")
        if self.shard_node >= self.shard_node_count:
            raise ValueError(
                f"SEARCH_SHARD_NODE={self.shard_node} must be below SEARCH_SHARD_NODE_COUNT={self.shard_node_count}"
            )
        return self
