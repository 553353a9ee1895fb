"""
Text Embeddings Inference (TEI), as its router reads and writes it.

Source: huggingface/text-embeddings-inference, router/src/http/types.rs and server.rs, router/src/lib.rs (2026). Unknown
fields are ignored there. Whether an input may be empty, and how many there may be, is for the routes: it decides the
type of the error.
"""

from typing import Annotated, Literal

from pydantic import Field

from services.common.wire.base import ReplyModel
from services.common.wire.dialects import DialectInputs, DialectModel, DialectText, TokenId, input_list, single_or_list
from services.common.wire.openai import OpenAIEmbeddingRequest

Direction = Literal["right", "left", "Right", "Left"]


class TruncatingRequest(DialectModel):
    """What TEI's inference requests share; *truncate* left out or null means the server's setting."""

    truncate: bool | None = None
    truncation_direction: Direction = "right"
    prompt_name: str | None = None

    def direction(self) -> Literal["right", "left"]:
        """Return the end that is cut off."""
        return "left" if self.truncation_direction in ("left", "Left") else "right"


class TeiEmbedAllRequest(TruncatingRequest):
    """`POST /embed_all`: an input or a list of them, each a text or token ids."""

    inputs: DialectInputs

    def input_list(self) -> list[str | tuple[int, ...]]:
        """Return the inputs as a list."""
        return input_list(self.inputs)


class TeiEmbedRequest(TeiEmbedAllRequest):
    """`POST /embed`; answered with a bare array of vectors."""

    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None


class TeiOpenAIRequest(OpenAIEmbeddingRequest):
    """`POST /v1/embeddings` of a TEI server, which has one model: its name may be left out."""

    model: str | None = None  # type: ignore[assignment]  # OpenAI requires it.


class SimilarityInput(DialectModel):
    """One sentence and those that it is compared with."""

    source_sentence: DialectText
    sentences: list[DialectText]


class TeiSimilarityRequest(DialectModel):
    """`POST /similarity`; answered with a bare array of cosines."""

    inputs: SimilarityInput
    parameters: TruncatingRequest | None = None


class TeiTokenizeRequest(DialectModel):
    """`POST /tokenize`; answered with one list of tokens a text."""

    inputs: DialectText | list[DialectText]
    add_special_tokens: bool = True
    prompt_name: str | None = None

    def texts(self) -> list[str]:
        """Return the inputs as a list."""
        return single_or_list(self.inputs)


class TeiToken(ReplyModel):
    """One token; *start* and *stop* are offsets in the UTF-8 bytes of the text, prompt included, null for special ones."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TeiDecodeRequest(DialectModel):
    """`POST /decode`; answered with one text a sequence."""

    ids: list[TokenId] | list[list[TokenId]]
    skip_special_tokens: bool = True

    def sequences(self) -> list[list[int]]:
        """Return the ids as a list of sequences."""
        if self.ids and isinstance(self.ids[0], list):
            return [one for one in self.ids if isinstance(one, list)]
        return [[one for one in self.ids if isinstance(one, int)]]


class TeiPooling(ReplyModel):
    """How token vectors become one: `cls`, `mean`, `last_token`…"""

    pooling: str


class TeiModelType(ReplyModel):
    """What kind of model answers; the embedding service has embedding models alone."""

    embedding: TeiPooling


class TeiServerInfo(ReplyModel):
    """What `GET /info` tells whatever the kind of model."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


class TeiInfo(TeiServerInfo):
    """`GET /info` of a server of embedding models."""

    model_type: TeiModelType


class TeiError(ReplyModel):
    """An error; *error_type* is Validation, Tokenizer, Empty, Backend, Overloaded or Unhealthy."""

    error: str
    error_type: str
