"""Two services in use under /api/v1: a TEI derivative's `/embed`, and an E5 service's `/embeddings/…`."""

from typing import Annotated

from pydantic import Field

from services.common.wire.base import ReplyModel
from services.common.wire.dialects import DialectModel, DialectText, single_or_list
from services.common.wire.openai import OpenAIUsage
from services.common.wire.tei import TruncatingRequest


class ApiEmbedRequest(TruncatingRequest):
    """`POST /api/v1/embed`: TEI's request, texts only, cut to the model's limit unless that is refused."""

    inputs: DialectText | list[DialectText]
    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def texts(self) -> list[str]:
        """Return the inputs as a list."""
        return single_or_list(self.inputs)


class ApiEmbedding(ReplyModel):
    """One vector and which input it is of."""

    embedding: list[float]
    index: int


class ApiTimings(ReplyModel):
    """Durations in the notation of the service's language: `120µs`, `2ms`, `1.5s`."""

    tokenization: str
    queue: str
    inference: str


class ApiEmbedReply(ReplyModel):
    """Vectors in the order of the inputs."""

    data: list[ApiEmbedding]
    usage: OpenAIUsage
    timings: ApiTimings


class E5Request(DialectModel):
    """`POST /api/v1/embeddings/embed`: a query."""

    text: DialectText


class E5Reply(ReplyModel):
    """The query's vector."""

    vector: list[float]


class E5BatchRequest(DialectModel):
    """`POST /api/v1/embeddings/embed_batch`: passages, or queries."""

    texts: list[DialectText]
    is_query: bool = False


class E5BatchReply(ReplyModel):
    """One vector a text, in order."""

    vectors: list[list[float]]


class E5Message(ReplyModel):
    """`GET /api/v1/embeddings/`."""

    message: str
