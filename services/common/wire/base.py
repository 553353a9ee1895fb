"""Field types and the base model that every request shape is made of: what is valid is said once, here."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints
from pydantic_core import PydanticCustomError

MAX_ID_CHARS = 512
MAX_COLLECTION_CHARS = 64


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


Text = Annotated[str, AfterValidator(_storable)]
NonBlankText = Annotated[str, AfterValidator(_storable), AfterValidator(_not_blank)]
DocumentId = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_storable), AfterValidator(_not_blank)
]
CollectionName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_COLLECTION_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_storable)]
MetadataValue = bool | int | FiniteFloat | Text | list[Text]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=256)]
Vector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=16_384)]
