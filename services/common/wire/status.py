"""Shapes of the search service's status."""

from typing import Any

from pydantic import Field

from services.common.wire.base import ReplyModel
from services.common.wire.collections import CollectionReply


class BreakerReply(ReplyModel):
    """
    A breaker: `closed`, `half-open` or `open`, and how many calls of its last window were made and failed or were slow.

    *opened_s_ago* is when it last opened, for one that is not closed.
    """

    state: str
    opened_s_ago: float | None = None
    calls: int
    failures: int


class AdmissionReply(ReplyModel):
    """Searches under way and allowed at once, by cost; how many wait; and the pressure: 0 none, 1 some are turned away."""

    in_flight: float
    limit: float
    waiting: int
    pressure: float


class StatusReply(ReplyModel):
    """
    `GET /status`: how things stand, as this process knows it.

    *breakers* has those of all that it calls, hosts of shards among them; *cache* each layer of the result cache.
    """

    version: str
    collections: list[CollectionReply]
    dependencies: dict[str, dict[str, Any]]
    cache: dict[str, Any]
    breakers: dict[str, BreakerReply] = Field(default_factory=dict)
    admission: AdmissionReply | None = None
