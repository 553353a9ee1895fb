"""The embedding and rerank services, and the result cache, as the use cases need them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.deadline import Deadline
from services.search.ports.ledger import Collection


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """The model behind the embedding service."""

    name: str
    fingerprint: str
    dim: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors (float32, unit length, shape [n, dim]) in the order of the texts, and what made them."""

    vectors: NDArray[np.float32]
    model: EmbeddingModel


class EmbeddingClient(Protocol):
    """The embedding service, behind its breaker."""

    async def embed_query(self, text: str, deadline: Deadline, *, model: str | None = None) -> Embedded:
        """
        Embed one question in the `query` lane, with *model* or the service's default.

        Raises:
            DependencyUnavailable, DeadlineExceeded: The service does not answer (in time).
            NotFound: It has no such model.
        """
        ...

    async def embed_queries(self, texts: Sequence[str], deadline: Deadline, *, model: str | None = None) -> Embedded:
        """Embed many questions at once, in the `bulk` lane: nobody waits for one of them. Raises as embed_query does."""
        ...

    async def embed_documents(self, texts: Sequence[str], deadline: Deadline, *, model: str | None = None) -> Embedded:
        """Embed documents in the `bulk` lane. Raises as embed_query does, and Overloaded."""
        ...

    async def model(self, deadline: Deadline, *, model: str | None = None) -> EmbeddingModel:
        """Describe *model* or the service's default. Raises as embed_query does."""
        ...


@dataclass(frozen=True, slots=True)
class Reranked:
    """
    A score from 0 to 1 for each text, None where the deadline came first; *model* says who scored.

    *coarse* are the places of those that only the first of two models scored.
    """

    scores: Sequence[float | None]
    model: str
    fingerprint: str
    coarse: frozenset[int] = frozenset()


class RerankClient(Protocol):
    """The rerank service, behind its breaker."""

    @property
    def under_way(self) -> int:
        """How many calls have no answer yet."""
        ...

    async def rerank(
        self, query: str, texts: Sequence[str], deadline: Deadline, *, priors: Sequence[float]
    ) -> Reranked:
        """
        Score *texts*, the likeliest first; *priors* is how good retrieval holds each to be.

        Raises DependencyUnavailable or DeadlineExceeded.
        """
        ...


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """
    A stored answer, the operation number and epoch it is true for, and when its making began (Unix time).

    *body* is `Answer.head`: the reply's JSON but for what each caller is told by itself.
    """

    as_of: int
    created_at: float
    body: bytes
    epoch: str = ""


class ResultCache(Protocol):
    """Answers by key. Losing it, or any entry, is a miss and never an error."""

    async def get(self, key: str) -> CacheEntry | None:
        """Return the entry, if there is one; None also when the cache cannot be reached."""
        ...

    async def put(self, key: str, entry: CacheEntry) -> None:
        """Keep *entry* for a while; does nothing when the cache cannot be reached."""
        ...

    @property
    def available(self) -> bool:
        """False while the cache is known to be out of reach."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class SharedResultCache(ResultCache, Protocol):
    """
    A result cache that several processes use, with claims: who holds one makes the answer, the others wait for it.

    A claim saves work and guards nothing: one that is lost costs a second making of the same answer.
    """

    async def claim(self, key: str, for_s: float) -> bool:
        """Claim *key* for *for_s* seconds; False where another process has. True where claims cannot be kept now."""
        ...

    async def extend(self, key: str, for_s: float) -> None:
        """Let the claim on *key* last for *for_s* seconds from now."""
        ...

    async def settle(self, key: str, entry: CacheEntry | None) -> None:
        """Keep *entry*, if there is one, and let the claim on *key* go."""
        ...

    async def peek(self, key: str) -> tuple[CacheEntry | None, bool]:
        """Return the entry, and whether *key* is claimed; neither when the cache cannot be reached."""
        ...


class Watermarks(Protocol):
    """The last acknowledged operation of each collection, whoever wrote it."""

    async def read(self, collection: Collection, deadline: Deadline) -> int | None:
        """
        Return the number of the last operation that was acknowledged at some moment after this call began, or a later one.

        None where it cannot be known, soon and within *deadline*: then nothing older can be proven to be true still.
        """
        ...

    async def aclose(self) -> None:
        """Stop reading."""
        ...
