"""OpenAI's embeddings API, as its SDK sends and reads it: `POST /v1/embeddings`."""

from typing import Annotated, Literal

from pydantic import Field

from services.common.wire.base import ReplyModel
from services.common.wire.dialects import DialectInputs, DialectModel, input_list


class OpenAIEmbeddingRequest(DialectModel):
    """One input or a list: texts, or token ids that are used as they are. *user* is accepted and not used, as there."""

    input: DialectInputs
    model: str
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    def inputs(self) -> list[str | tuple[int, ...]]:
        """Return the input as a list."""
        return input_list(self.input)


class OpenAIEmbedding(ReplyModel):
    """One vector as floats or as base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class OpenAIUsage(ReplyModel):
    """Real tokens, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddingReply(ReplyModel):
    """OpenAI's reply."""

    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage
