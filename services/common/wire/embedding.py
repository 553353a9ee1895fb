"""Shapes of the embedding service: its native `/embed`, `/models`, `/info` and `/tokenize`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from services.common.wire.base import InputText, ReplyModel, RequestModel

MAX_INPUTS = 2048

Texts = Annotated[list[InputText], Field(min_length=1, max_length=MAX_INPUTS)]


class EmbedRequest(RequestModel):
    """
    One text or up to 2,048; the reply keeps their order.

    `text` and `texts` are other names of `inputs`, and `model_name` of `model`, for clients of plain services.
    """

    inputs: InputText | Texts | None = None
    text_list: Texts | None = Field(default=None, alias="texts")
    text: InputText | None = None
    input_type: Literal["query", "document"] | None = Field(
        default=None, description="Applies the model's own prompt for queries or for documents."
    )
    prompt_name: str | None = Field(default=None, description="Applies the model's prompt of this name.")
    model: str | None = Field(default=None, description="The model's name; the default model when left out.")
    model_name: str | None = None
    normalize: bool = True
    truncate: bool | None = Field(
        default=None,
        description="False: a text over the model's limit is an error, not cut. Usually true when left out.",
    )
    truncation_direction: Literal["right", "left"] = Field(
        default="right", description="Which side of a text over the limit is cut off."
    )
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Vectors are cut to this size and normalised again, where the model allows it."
    )
    lane: Literal["query", "bulk"] | None = Field(
        default=None, description="`bulk` work waits for queries. One text is a query, several are bulk, unless said."
    )
    encoding: Literal["float", "base64", "int8", "binary"] = Field(
        default="float",
        description="`base64` is little-endian float32, a third of the size and far faster to read; `int8` numbers are to "
        "be multiplied by the item's `scale`; `binary` is the signs, packed into bytes, less 128.",
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        values = {"inputs": self.inputs, "texts": self.text_list, "text": self.text}
        given = [name for name, value in values.items() if value is not None]
        if not given:
            raise PydanticCustomError("missing", "a text, or a list of texts, is required", {"param": "inputs"})
        if len(given) > 1:
            raise PydanticCustomError(
                "twice", "is another name of {first}: send one of them", {"param": given[1], "first": given[0]}
            )
        if self.model is not None and self.model_name is not None:
            raise PydanticCustomError("twice", "is another name of model: send one of them", {"param": "model_name"})
        return self

    def texts(self) -> list[str]:
        """Return the inputs as a list."""
        given = self.inputs or self.text_list or self.text or []
        return [given] if isinstance(given, str) else given

    @property
    def field(self) -> str:
        """The name that the caller gave its inputs by."""
        return "inputs" if self.inputs else "texts" if self.text_list else "text"

    @property
    def wants_plain_reply(self) -> bool:
        """Whether the caller spoke with other names, and so expects `embeddings` and `latency_ms` too."""
        return self.inputs is None or self.model_name is not None


class EmbeddingItem(ReplyModel):
    """One vector, with the tokens the model read and whether the text was cut; *scale* goes with `int8`."""

    index: int
    embedding: list[float] | str
    tokens: int
    truncated: bool
    scale: float | None = None


class EmbedUsage(ReplyModel):
    """Real tokens, special tokens included; *cached_tokens* are those of texts that the cache knew."""

    prompt_tokens: int
    total_tokens: int
    cached_tokens: int = 0


class Timings(ReplyModel):
    """Where a request's time went inside a model service."""

    tokenization_ms: float
    queue_ms: float
    inference_ms: float


class EmbedReply(ReplyModel):
    """Vectors in the order of the inputs; *fingerprint* identifies what made them, cut dimensions included."""

    data: list[EmbeddingItem]
    model: str
    fingerprint: str
    usage: EmbedUsage
    timings: Timings


class EmbeddingInfo(ReplyModel):
    """`GET /info`: a model, and how it runs here."""

    model: str
    fingerprint: str
    dim: int
    max_tokens: int
    prompts: dict[str, str]
    runtime: str
    precision: str
    precision_reason: str
    revision: str = ""
    device: str = ""
    pooling: str = ""
    dimensions: list[int] | Literal["any"] = Field(default_factory=list)
    weights_bytes: int = 0
    measured: dict[str, dict[str, float]] = Field(default_factory=dict)
    placement: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, int] = Field(default_factory=dict)


class TokenizeRequest(RequestModel):
    """One text or up to 2,048; *prompt_name* puts the model's prompt of this name before each."""

    inputs: InputText | Texts
    model: str | None = None
    add_special_tokens: bool = True
    prompt_name: str | None = None

    def texts(self) -> list[str]:
        """Return the inputs as a list."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class Piece(ReplyModel):
    """One token: *start* and *stop* are character offsets in the text, null for a special token."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TokenizedItem(ReplyModel):
    """All tokens of one text, uncut."""

    index: int
    tokens: list[Piece]


class TokenizeReply(ReplyModel):
    """`POST /tokenize`: the tokens of each text, in order."""

    data: list[TokenizedItem]
    model: str


class ModelCard(ReplyModel):
    """One model of a list of models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tercet"


class ModelList(ReplyModel):
    """A list of models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class EmbeddingModelCard(ModelCard):
    """One model of `GET /models`: under which names it is served, and whether it is in memory now."""

    default: bool
    loaded: bool
    aliases: list[str]


class EmbeddingModelList(ReplyModel):
    """`GET /models`."""

    object: Literal["list"] = "list"
    data: list[EmbeddingModelCard]
