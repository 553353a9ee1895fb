"""Shapes of collections: how one is made and described."""

from typing import Annotated, Literal

from pydantic import Field

from services.common.wire.base import CollectionName, ReplyModel, RequestModel


class CollectionRequest(RequestModel):
    """Creates a collection; *dim* only for collections whose documents bring their own vectors."""

    name: CollectionName
    shards: Annotated[int, Field(ge=1, le=256)] | None = None
    dim: Annotated[int, Field(ge=1, le=16_384)] | None = Field(
        default=None, description="Documents bring vectors of this many dimensions and no model is used."
    )


class CollectionReply(ReplyModel):
    """A collection: its identity, model, size, and how far its shards have applied the ledger."""

    name: str
    uuid: str
    model: str | None
    fingerprint: str
    dim: int
    metric: Literal["cosine"]
    shards: int
    documents: int
    seq: int
    applied_seq: int


class CollectionList(ReplyModel):
    """`GET /collections`."""

    collections: list[CollectionReply]
