"""Shapes of the embedding service: its native `/embed`, and OpenAI's `/v1/embeddings` (wire as read from the openai SDK)."""

from typing import Annotated, Literal

from pydantic import Field

from services.common.wire.base import NonBlankText, ReplyModel, RequestModel

MAX_INPUTS = 2048


class EmbedRequest(RequestModel):
    """One text or up to 2,048; the reply keeps their order."""

    inputs: NonBlankText | Annotated[list[NonBlankText], Field(min_length=1, max_length=MAX_INPUTS)]
    input_type: Literal["query", "document"] | None = Field(
        default=None, description="Applies the model's own prompt for queries or for documents."
    )
    model: str | None = Field(default=None, description="The model's name; the default model when left out.")
    normalize: bool = True
    truncate: bool = Field(default=True, description="False: a text over the model's limit is an error, not cut.")
    lane: Literal["query", "bulk"] | None = Field(
        default=None, description="`bulk` work waits for queries. One text is a query, several are bulk, unless said."
    )
    encoding: Literal["float", "base64"] = Field(
        default="float", description="`base64` is little-endian float32, a third of the size and far faster to read."
    )

    def texts(self) -> list[str]:
        """Return the inputs as a list."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class EmbeddingItem(ReplyModel):
    """One vector, with the tokens the model read and whether the text was cut."""

    index: int
    embedding: list[float] | str
    tokens: int
    truncated: bool


class EmbedUsage(ReplyModel):
    """Real tokens, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Timings(ReplyModel):
    """Where a request's time went inside a model service."""

    tokenization_ms: float
    queue_ms: float
    inference_ms: float


class EmbedReply(ReplyModel):
    """Vectors in the order of the inputs; *fingerprint* identifies what made them."""

    data: list[EmbeddingItem]
    model: str
    fingerprint: str
    usage: EmbedUsage
    timings: Timings


class EmbeddingInfo(ReplyModel):
    """`GET /info`: the model, and how it runs here."""

    model: str
    fingerprint: str
    dim: int
    max_tokens: int
    prompts: dict[str, str]
    runtime: str
    precision: str
    precision_reason: str


class OpenAIEmbeddingRequest(RequestModel):
    """OpenAI's request; *user* is accepted and not used, as there."""

    input: NonBlankText | Annotated[list[NonBlankText], Field(min_length=1, max_length=MAX_INPUTS)]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    def texts(self) -> list[str]:
        """Return the input as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


class OpenAIEmbedding(ReplyModel):
    """One vector as floats or as base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class OpenAIEmbeddingReply(ReplyModel):
    """OpenAI's reply."""

    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: EmbedUsage


class ModelCard(ReplyModel):
    """One model of `GET /v1/models` and `GET /models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tercet"


class ModelList(ReplyModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
