"""One text as a model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TruncationDirection = Literal["right", "left"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, special tokens included, and whether the text was cut to the model's limit."""

    ids: Sequence[int]
    truncated: bool


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token of a text: *start* and *stop* are character offsets, None for a special token that covers nothing."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None
