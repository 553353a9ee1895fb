"""What the reranker needs from a scorer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Pair(NamedTuple):
    """A query and one document's text."""

    query: str
    text: str


@dataclass(frozen=True, slots=True)
class PreparedPair:
    """
    A tokenised pair.

    *tokens* is what the pair counts in usage, *cost_tokens* what the model will compute for it: less where a
    document's vectors are known. *payload* is the scorer's own.
    """

    tokens: int
    cost_tokens: int
    payload: Any


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """A scorer's identity, and in words what its score is made of."""

    name: str
    kind: str
    score: str
    fingerprint: str
    max_tokens: int
    runtime: str
    precision: str


class Backend(Protocol):
    """A loaded scorer. `prepare` may be called from any thread; `score` always is from the same one."""

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        ...

    def prepare(self, pairs: Sequence[Pair]) -> list[PreparedPair]:
        """
        Tokenise *pairs*, in order. Documents are cut to the model's limit; the query never is.

        Raises:
            InvalidInput: A query leaves no room for a document.
        """
        ...

    def score(self, batch: Sequence[PreparedPair]) -> list[float]:
        """Return the raw score of each pair, in order; higher is better."""
        ...

    def to_probability(self, raw: float) -> float:
        """Return *raw* as a value from 0 to 1, keeping the order."""
        ...
