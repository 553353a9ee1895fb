"""Shapes of collections: how one is made, described, renamed and copied."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from services.common.wire.base import CollectionName, MetadataKey, ReplyModel, RequestModel

Metric = Literal["cosine", "dot", "l2"]
AttributeKind = Literal["any", "keyword", "number", "bool", "date"]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Shards = Annotated[int, Field(ge=1, le=256)]
Attributes = Annotated[dict[MetadataKey, AttributeKind], Field(max_length=256)]
Language = Annotated[str, Field(min_length=1, max_length=32)]


class CollectionRequest(RequestModel):
    """Creates a collection for a model's vectors, or with *dim* for vectors that the documents bring."""

    name: CollectionName
    model: ModelName | None = Field(default=None, description="A model of the embedding service; its default if none.")
    metric: Metric = Field(
        default="cosine",
        description="`cosine` scales the callers' own vectors to unit length; `dot` and `l2` keep them as they are. "
        "A model's vectors have unit length under every metric.",
    )
    dim: Annotated[int, Field(ge=1, le=16_384)] | None = Field(
        default=None, description="Documents bring vectors of this many dimensions and no model is used."
    )
    shards: Shards | None = None
    attributes: Attributes | None = Field(
        default=None,
        description="The metadata fields that filters may name, with their kinds; all as `any` if left out.",
    )
    language: Language = Field(default="english", description="Chooses stemming and stop words of its text.")


class CollectionReply(ReplyModel):
    """A collection: its identity, model, settings, size, and how far its shards have applied the ledger."""

    name: str
    uuid: str
    model: str | None
    fingerprint: str
    dim: int
    metric: Metric
    shards: int
    documents: int
    seq: int
    applied_seq: int
    attributes: Mapping[str, AttributeKind] | None = None
    language: str = "english"
    aliases: list[str] = Field(default_factory=list)
    created_at: float = 0.0


class CollectionList(ReplyModel):
    """`GET /collections`."""

    collections: list[CollectionReply]


class ShardStats(ReplyModel):
    """How one shard stands on one host; *failure* is why it fell behind, if it did."""

    shard: int
    applied_seq: int
    documents: int
    rows: int
    segments: Mapping[str, int]
    memory_bytes: int
    disk_bytes: int
    snapshot_seq: int
    catching_up: bool
    failure: str | None = None


class CollectionStats(ReplyModel):
    """A collection's ledger, and its shards by the name of the host that answered."""

    collection: str
    documents: int
    seq: int
    trimmed_seq: int
    hosts: Mapping[str, list[ShardStats]]


class AliasRequest(RequestModel):
    """Lets each alias mean a collection, or nothing for null: all at once."""

    changes: Annotated[dict[CollectionName, CollectionName | None], Field(min_length=1, max_length=100)]


class AliasList(ReplyModel):
    """Every alias with the collection that it means."""

    aliases: Mapping[str, str]


class ReindexRequest(RequestModel):
    """Copies a collection into *target*, with other settings where they are given; then lets *alias* mean the copy."""

    target: CollectionName
    model: ModelName | None = None
    shards: Shards | None = None
    metric: Metric | None = None
    attributes: Attributes | None = None
    language: Language | None = None
    alias: CollectionName | None = None


class ReindexReply(ReplyModel):
    """
    How a copy stands: up to operation *position* of the source's *source_seq*.

    *copied* documents were written, of which *embedded* by the target's model; *unchanged* were there already.
    *trouble* is what it waits for while it is `copying`, or why it `failed`.
    """

    source: str
    target: str
    state: Literal["copying", "done", "failed", "cancelled"]
    position: int
    source_seq: int
    copied: int
    unchanged: int
    embedded: int
    deleted: int
    refused: int
    alias: str | None = None
    trouble: str | None = None


class AuditedShard(ReplyModel):
    """What an audit of one shard found, by kind of difference, and how many were mended."""

    shard: int
    applied_seq: int
    documents: int
    differences: Mapping[str, list[str]]
    repaired: int


class AuditReply(ReplyModel):
    """An audit of a collection's shards by host; *clean* when none differs from the ledger."""

    collection: str
    clean: bool
    hosts: Mapping[str, list[AuditedShard]]


class SnapshotReply(ReplyModel):
    """By host and shard, the operation number that its newest snapshot is true for."""

    collection: str
    hosts: Mapping[str, Mapping[str, int]]
