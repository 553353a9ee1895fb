"""One text as a model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, special tokens included, and whether the text was cut to the model's limit."""

    ids: Sequence[int]
    truncated: bool
