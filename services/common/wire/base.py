"""Field types and the base model that every request shape is made of: what is valid is said once, here."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

MAX_ID_CHARS = 512
MAX_COLLECTION_CHARS = 64
MAX_TEXT_CHARS = 1_000_000
MAX_INPUT_CHARS = 8_000_000
MAX_QUERY_CHARS = 32_768


class RequestModel(BaseModel):
    """A request: an unknown field is an error that names it, and values are not coerced from other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ReplyModel(BaseModel):
    """A reply: readers ignore fields they do not know, so that services can be upgraded one by one."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def _storable(value: str) -> str:
    """Refuse what a database or a tokenizer cannot hold: null bytes and lone surrogates."""
    if "\x00" in value:
        raise PydanticCustomError("null_byte", "must not contain a null byte (U+0000)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("lone_surrogate", "must be valid Unicode, without lone surrogates") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "must not be empty or only white space")
    return value


def _not_a_dot_segment(value: str) -> str:
    """Refuse what HTTP clients take out of a path (RFC 3986, 5.2.4): the request would be for something else."""
    if value in (".", ".."):
        raise PydanticCustomError("dot_segment", "must not be '.' or '..', which cannot be part of a path")
    return value


Text = Annotated[str, AfterValidator(_storable)]
QueryText = Annotated[
    str, StringConstraints(max_length=MAX_QUERY_CHARS), AfterValidator(_storable), AfterValidator(_not_blank)
]
NonBlankText = Annotated[
    str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_storable), AfterValidator(_not_blank)
]
InputText = Annotated[
    str, StringConstraints(max_length=MAX_INPUT_CHARS), AfterValidator(_storable), AfterValidator(_not_blank)
]
DocumentId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_ID_CHARS),
    AfterValidator(_storable),
    AfterValidator(_not_blank),
    AfterValidator(_not_a_dot_segment),
]
CollectionName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_COLLECTION_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_storable)]
LongText = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_storable)]
RerankedText = Annotated[str, StringConstraints(max_length=MAX_INPUT_CHARS), AfterValidator(_storable)]


def _explain(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Say what metadata may hold, instead of what each branch of the union would have wanted."""
    try:
        return validate(value)
    except ValidationError:
        raise PydanticCustomError(
            "metadata_value", "must be a string, a finite number of at most 64 bits, true, false or a list of strings"
        ) from None


_Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
MetadataValue = Annotated[bool | _Integer | FiniteFloat | Text | list[Text], WrapValidator(_explain)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=256)]
Vector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=16_384)]
