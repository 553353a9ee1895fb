"""What the requests of other servers' dialects are made of."""

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag

from services.common.wire.base import MAX_INPUT_CHARS, RequestModel, Text


class DialectModel(RequestModel):
    """A request in somebody else's dialect: its servers ignore fields that they do not know, and clients send some."""

    model_config = ConfigDict(extra="ignore")


# Unlike the native routes, other servers take a text of white space alone.
DialectText = Annotated[Text, StringConstraints(max_length=MAX_INPUT_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _kind(value: Any) -> str:
    """Name the branch that a value means, so that an error is about that branch and long lists are checked once."""
    if not isinstance(value, list):
        return "str"
    return "list[int]" if value and type(value[0]) is int else "list[item]"


def _item_kind(value: Any) -> str:
    return "list[int]" if isinstance(value, list) else "str"


_Item = Annotated[
    Annotated[DialectText, Tag("str")] | Annotated[list[TokenId], Tag("list[int]")],
    Discriminator(_item_kind),
]

# A text, token ids, or a list in which both may be mixed. Nothing is said about emptiness: dialects differ there.
DialectInputs = Annotated[
    Annotated[DialectText, Tag("str")]
    | Annotated[list[TokenId], Tag("list[int]")]
    | Annotated[list[_Item], Tag("list[item]")],
    Discriminator(_kind),
]


def input_list(inputs: str | list[int] | list[str | list[int]]) -> list[str | tuple[int, ...]]:
    """Return *inputs* as a list of texts and of token ids; a single one is a list of one."""
    if isinstance(inputs, str):
        return [inputs]
    if inputs and isinstance(inputs[0], int):
        return [tuple(number for number in inputs if isinstance(number, int))]
    return [one if isinstance(one, str) else tuple(one) for one in inputs if not isinstance(one, int)]


def single_or_list(inputs: str | list[str]) -> list[str]:
    """Return *inputs* as a list of texts; a single one is a list of one."""
    return [inputs] if isinstance(inputs, str) else inputs
