"""What a search is thought to cost, and how much of it is done under pressure."""

import pytest

from services.common.wire.search import SearchRequest
from services.search.effort import reduced, reranking_cost, retrieval_cost


def cost(rerank_candidates: int = 30, candidates: int = 100, **fields: object) -> float:
    request = SearchRequest.model_validate({"query": "tides", **fields})
    return retrieval_cost(request, candidates=candidates) + reranking_cost(request, candidates=rerank_candidates)


def test_a_lexical_search_is_the_unit() -> None:
    """Without vectors and without reranking, of the usual depth, it costs 1."""
    assert cost(mode="lexical", rerank=False) == 1.0


def test_what_is_more_work_costs_more() -> None:
    """Vectors, all vectors, deeper lists and each candidate to rerank add to the cost."""
    lexical, hybrid = cost(mode="lexical", rerank=False), cost(rerank=False)
    assert lexical < hybrid < cost(rerank=False, exact=True)
    assert hybrid < cost(rerank=False, candidates=1000)
    assert hybrid < cost(rerank_candidates=10) < cost(rerank_candidates=30)


def test_a_search_without_words_is_not_reranked() -> None:
    """So reranking costs it nothing."""
    request = SearchRequest(query_vector=[1.0, 0.0], mode="dense")
    assert reranking_cost(request, candidates=30) == 0.0
    assert retrieval_cost(request, candidates=100) < 2.0


@pytest.mark.parametrize(
    ("candidates", "pressure", "left"),
    [(30, 0.0, 30), (30, 0.5, 18), (30, 1.0, 6), (30, 7.0, 6), (10, 1.0, 5), (3, 1.0, 3), (0, 1.0, 0)],
)
def test_pressure_leaves_fewer_candidates(candidates: int, pressure: float, left: int) -> None:
    """All without pressure, a fifth at most pressure, but never under five where there were five."""
    assert reduced(candidates, pressure) == left
