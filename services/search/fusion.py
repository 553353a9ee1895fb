"""How candidates' scores become one order: pure functions over what the shards proposed."""

import math
from collections.abc import Callable, Sequence, Set
from operator import itemgetter
from typing import NamedTuple

from services.common.wire.search import Fusion, ScoreKind
from services.search.ports import Candidate, LexicalStatistics

RRF_K = 60
BM25_K1 = 1.2
LEAST_DOUBT = 1e-7  # A reranker that is sure in float32 is not sure for ever.
ROUNDING = 1e-6  # Shards score in float32: equal scores may differ in their last places.


class Ranked(NamedTuple):
    """A candidate with its fused score, and its final score of the kind that *score_kind* names."""

    candidate: Candidate
    fused: float
    score: float
    score_kind: ScoreKind
    rerank: float | None = None


def bm25_ceiling(terms: Sequence[str], statistics: LexicalStatistics | None) -> float:
    """
    Return the score that no document can exceed for *terms*: Σ idf · (k1 + 1), with Tantivy's idf and k1 = 1.2.

    A best score far below it says that no document has most of what the question asks with.
    """
    if statistics is None:
        return 0.0
    total = 0.0
    for term in terms:
        found = min(statistics.doc_freq.get(term, 0), statistics.documents)
        total += math.log(1 + (statistics.documents - found + 0.5) / (found + 0.5))
    return total * (BM25_K1 + 1)


def bm25_confidence(candidates: Sequence[Candidate], ceiling: float) -> float:
    """Return how near the best BM25 score comes to *ceiling* (`bm25_ceiling`), at most 1; 1 where that is unknown."""
    if ceiling <= 0:
        return 1.0
    return min(1.0, max((c.bm25 for c in candidates if c.bm25 is not None), default=0.0) / ceiling)


def fuse(candidates: Sequence[Candidate], *, method: Fusion, dense_weight: float, ceiling: float = 0.0) -> list[Ranked]:
    """
    Return *candidates*, the union of all shards' and both retrievers', best first; equal scores by id.

    `standardized`: each retriever's scores are standardised over the union (mean 0, deviation 1; a candidate without
    one of them counts with the lowest one seen, whatever the metric) and added, *dense_weight* against the rest.
    Standardising makes the best of many poor word matches look as sure as a perfect one; so BM25's part is also scaled by
    its confidence (`bm25_confidence`; a *ceiling* of 0 leaves it as it is). `rrf`: reciprocal rank fusion (Cormack et
    al., SIGIR 2009, k = 60). Where only one retriever ran, its own score is the order.
    """
    dense = _filled([candidate.dense for candidate in candidates])
    lexical = _filled([candidate.bm25 for candidate in candidates])
    if dense is None:
        return _ordered(candidates, lexical or [0.0] * len(candidates), "bm25")
    if lexical is None:
        return _ordered(candidates, dense, "dense")
    if method == "rrf":
        by_dense = _ranks(candidates, lambda candidate: candidate.dense)
        by_bm25 = _ranks(candidates, lambda candidate: candidate.bm25)
        scores = [
            sum(1.0 / (RRF_K + ranks[c.id]) for ranks in (by_dense, by_bm25) if c.id in ranks) for c in candidates
        ]
        return _ordered(candidates, scores, "fused")
    bm25_weight = (1.0 - dense_weight) * bm25_confidence(candidates, ceiling)
    pairs = zip(standardize(dense), standardize(lexical), strict=True)
    return _ordered(candidates, [dense_weight * d + bm25_weight * b for d, b in pairs], "fused")


def blend(
    ranked: Sequence[Ranked],
    scores: Sequence[float | None],
    *,
    weight: float,
    coarse: Set[int] = frozenset(),
) -> list[Ranked]:
    """
    Return *ranked* in the last order: the reranker's *scores* for its first entries, blended with the fused scores.

    Both are standardised over the entries that were scored, the reranker's as log-odds: as probabilities the best few
    would decide all. *weight* is the reranker's share. Entries at the places *coarse*, which only the first of two models
    scored, are blended apart and follow: its scores and the other's do not compare well enough for one order. Entries
    without a score come last, in retrieval order and with their retrieval score.
    """
    judged = [
        (entry, score, at in coarse)
        for at, (entry, score) in enumerate(zip(ranked, scores, strict=False))
        if score is not None
    ]
    fine = _blended([(entry, score) for entry, score, is_coarse in judged if not is_coarse], weight)
    rest = _blended([(entry, score) for entry, score, is_coarse in judged if is_coarse], weight)
    if fine and rest:
        rest = _below(rest, fine[-1].score)
    done = {entry.candidate.id for entry in (*fine, *rest)}
    return [*fine, *rest, *(entry for entry in ranked if entry.candidate.id not in done)]


def _blended(judged: Sequence[tuple[Ranked, float]], weight: float) -> list[Ranked]:
    rerank = standardize([log_odds(score) for _, score in judged])
    fused = standardize([entry.fused for entry, _ in judged])
    blended = [
        Ranked(entry.candidate, entry.fused, weight * r + (1.0 - weight) * f, "blended", score)
        for (entry, score), r, f in zip(judged, rerank, fused, strict=True)
    ]
    blended.sort(key=lambda entry: (-entry.score, entry.candidate.id))
    return blended


def _below(ranked: Sequence[Ranked], score: float) -> list[Ranked]:
    """Return *ranked* with scores moved down, all by as much, so that the first one's is under *score*."""
    down = max(0.0, ranked[0].score - score) + 1.0
    return [entry._replace(score=entry.score - down) for entry in ranked]


def log_odds(probability: float) -> float:
    """Return ln(p / (1 - p)), of what is nearer to 0 or 1 than `LEAST_DOUBT` that of the last value that is not."""
    kept = min(max(probability, LEAST_DOUBT), 1.0 - LEAST_DOUBT)
    return math.log(kept / (1.0 - kept))


def standardize(scores: Sequence[float]) -> list[float]:
    """Return *scores* with mean 0 and deviation 1; all zero where they differ by no more than rounding to float32."""
    if not scores:
        return []
    mean = math.fsum(scores) / len(scores)
    centred = [score - mean for score in scores]
    deviation = math.sqrt(math.fsum([part * part for part in centred]) / len(scores))
    if deviation <= ROUNDING * max(map(abs, scores)):
        return [0.0] * len(scores)
    return [part / deviation for part in centred]


def _filled(scores: Sequence[float | None]) -> list[float] | None:
    """Return *scores* with the lowest one where there is none; None where there are none at all."""
    lowest = min([score for score in scores if score is not None], default=None)
    return None if lowest is None else [lowest if score is None else score for score in scores]


def _ordered(candidates: Sequence[Candidate], scores: Sequence[float], kind: ScoreKind) -> list[Ranked]:
    alike = len(set(scores)) < len(scores)
    pairs = zip(scores, candidates, strict=True)
    order = sorted(pairs, key=_best_first) if alike else sorted(pairs, key=itemgetter(0), reverse=True)
    return [Ranked(candidate, score, score, kind) for score, candidate in order]


def _best_first(scored: tuple[float, Candidate]) -> tuple[float, str]:
    return -scored[0], scored[1].id


def _ranks(candidates: Sequence[Candidate], score: Callable[[Candidate], float | None]) -> dict[str, int]:
    scored = [(value, c.id) for c in candidates if (value := score(c)) is not None]
    scored.sort(key=lambda item: (-item[0], item[1]))
    return {id_: rank for rank, (_, id_) in enumerate(scored, 1)}
