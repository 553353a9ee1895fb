"""What the reranker needs from a scorer, and from a store of token vectors that processes share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Kind = Literal["cross-encoder", "classifier", "decoder", "late-interaction", "cascade", "fake"]

KEY_BYTES = 16


def text_key(text: str) -> bytes:
    """Return the hash that stands for *text* in caches, in this process and others: KEY_BYTES long."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class QueryTokens(NamedTuple):
    """
    A query's tokens, without special ones. *key* is its text's `text_key`.

    *cut* says that the query was longer than half of what the model reads, and that only its beginning is used.
    """

    key: bytes
    ids: NDArray[np.int32]
    cut: bool


class DocumentTokens(NamedTuple):
    """
    A whole document's tokens, uncut and without special ones. *key* is its text's `text_key`.

    *offsets*, shape [tokens, 2], say which characters of the text each token covers; None where the tokenizer knows not.
    """

    key: bytes
    ids: NDArray[np.int32]
    offsets: NDArray[np.int32] | None

    @property
    def nbytes(self) -> int:
        """What it takes in memory, roughly."""
        return 200 + self.ids.nbytes + (0 if self.offsets is None else self.offsets.nbytes)


class Window(NamedTuple):
    """Tokens *start* to *end* of a document, to be scored against a query. A document is None where a text stands alone."""

    query: QueryTokens
    document: DocumentTokens | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """
    A scorer's identity, and in words what its score is made of.

    *labels* are a classifier's, in the order of its outputs; *ranks* is false where those outputs say nothing about relevance
    (more than two labels), so that only classification is served.
    """

    name: str
    kind: Kind
    score: str
    fingerprint: str
    max_tokens: int
    runtime: str
    precision: str
    labels: tuple[str, ...] = ()
    ranks: bool = True


class Backend(Protocol):
    """
    A loaded scorer. `score` and `close` are always called from one thread, the rest from any.

    A backend reads query and document side by side in at most `info.max_tokens` tokens, special ones included.
    """

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        ...

    def tokenize_query(self, text: str) -> QueryTokens:
        """Tokenise a query; over half of `info.max_tokens` it is cut, and says so."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[DocumentTokens]:
        """Tokenise whole documents, in order."""
        ...

    def room(self, query: QueryTokens) -> int:
        """Return how many tokens of a document fit beside *query*; at least a third of `info.max_tokens`."""
        ...

    def tokens(self, window: Window) -> int:
        """Return how many tokens *window* counts in usage, special ones included."""
        ...

    def cost_tokens(self, window: Window) -> int:
        """Return how many tokens the model will compute for *window*: fewer than `tokens` where vectors are known."""
        ...

    def score(self, batch: Sequence[Window]) -> NDArray[np.float32]:
        """
        Return the model's outputs, shape [len(batch), outputs], in order.

        Raises:
            OutOfMemory: The device's memory does not hold even one of them.
        """
        ...

    def relevance(self, output: NDArray[np.float32]) -> float:
        """Return the raw score in one row of outputs; higher is better. Called only if `info.ranks`."""
        ...

    def to_probability(self, raw: float) -> float:
        """Return a raw score as a value from 0 to 1, keeping the order."""
        ...

    def close(self) -> None:
        """Give the memory back; nothing is called afterwards."""
        ...


@runtime_checkable
class SharesVectors(Protocol):
    """What a backend adds that keeps documents' token vectors, so that processes can share them. Any thread."""

    def lacking(self, windows: Sequence[Window]) -> list[bytes]:
        """Return the keys of the token vectors that *windows* need and this process has not, each once."""
        ...

    def take(self, key: bytes, value: bytes) -> None:
        """Keep token vectors that another process made; what cannot be read is ignored."""
        ...

    def fresh(self) -> list[tuple[bytes, bytes]]:
        """Return the token vectors of documents made since the last call, for others to take (bounded; the oldest go)."""
        ...
