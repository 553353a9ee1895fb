"""What a search will cost, and how much less of it is done when there is too much to do: pure functions."""

from typing import Final

from services.common.wire.search import SearchRequest

VECTORS: Final = 0.6  # Beside a lexical search, 1.0, of DEEP candidates: to embed the question and search the vectors,
EXACT: Final = 2.0  # … all of them,
RERANKED: Final = 0.2  # … and to rerank one candidate.
DEEP: Final = 100
LEAST_SHARE: Final = 0.2
LEAST_CANDIDATES: Final = 5


def retrieval_cost(request: SearchRequest, *, candidates: int) -> float:
    """Return what *request* costs up to reranking, in units of a lexical search, with so many *candidates* to retrieve."""
    depth = max(0, candidates - DEEP) / DEEP
    vectors = 0.0
    if request.mode != "lexical":
        vectors = EXACT if request.exact else VECTORS
    return 1.0 + 0.5 * depth + vectors


def reranking_cost(request: SearchRequest, *, candidates: int) -> float:
    """Return what reranking so many *candidates* adds to that; 0 where *request* is not reranked."""
    return RERANKED * candidates if request.rerank and request.query is not None else 0.0


def reduced(candidates: int, pressure: float) -> int:
    """Return how many of *candidates* to rerank under *pressure* (0 to 1): all at 0, a fifth at 1, but not under five."""
    share = 1.0 - (1.0 - LEAST_SHARE) * min(1.0, max(0.0, pressure))
    return max(min(candidates, LEAST_CANDIDATES), round(candidates * share))
