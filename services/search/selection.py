"""Which of the ranked candidates make the answer: thresholds, groups and diversity, as pure functions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from services.common.wire.search import Threshold
from services.search.fusion import Ranked
from services.search.ports import MetadataValue, Vector

GroupKey = tuple[Any, ...]


def stage_score(entry: Ranked, kind: Threshold) -> float | None:
    """Return the entry's score of one stage; None where that stage did not see it."""
    match kind:
        case "dense":
            return entry.candidate.dense
        case "bm25":
            return entry.candidate.bm25
        case "fused":
            return entry.fused
    return entry.rerank


def at_least(ranked: Sequence[Ranked], kind: Threshold, value: float) -> list[Ranked]:
    """Return the entries whose score of *kind* is *value* or more, in their order; those without one are left out."""
    return [entry for entry in ranked if (score := stage_score(entry, kind)) is not None and score >= value]


def group_key(id_: str, metadata: Mapping[str, MetadataValue], field: str) -> GroupKey:
    """
    Return what documents of one group share: the value of *field*, a list being one value as a whole, in its order.

    A document without the field is a group of its own. 1 equals 1.0, and true equals neither 1 nor "true".
    """
    value = metadata.get(field)
    if value is None:
        return ("without", id_)
    if isinstance(value, list):
        return ("list", *value)
    return (
        "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__,
        value,
    )


def first_of_each(ranked: Iterable[tuple[Ranked, GroupKey]]) -> Iterator[Ranked]:
    """Yield the first entry of each group, in the order given, as *ranked* is read."""
    seen: set[GroupKey] = set()
    for entry, key in ranked:
        if key not in seen:
            seen.add(key)
            yield entry


def head(ranked: Sequence[Ranked], limit: int) -> int:
    """Return how many of the first *limit* entries have scores that compare: those of the first one's kind."""
    kind = ranked[0].score_kind if ranked else None
    return next((n for n, entry in enumerate(ranked[:limit]) if entry.score_kind != kind), min(limit, len(ranked)))


def diversify(ranked: Sequence[Ranked], vectors: Sequence[Vector], diversity: float, *, limit: int) -> list[Ranked]:
    """
    Return *ranked* (scores of one kind, best first) with its first *limit* in the order of maximal marginal relevance.

    Carbonell & Goldstein, SIGIR 1998: the next entry is the one with the highest λ·relevance − (1 − λ)·(greatest cosine
    to an entry before it), λ = 1 − *diversity*. Relevance is the score, scaled so that the best has 1 and the last 0.
    Equal ones keep their order; 0 keeps the whole order. *vectors* has one for each entry; what is not chosen follows.
    """
    if diversity <= 0 or len(ranked) < 2:
        return list(ranked)
    scores = np.array([entry.score for entry in ranked], dtype=np.float64)
    spread = scores.max() - scores.min()
    relevance = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    rows = np.asarray(vectors, dtype=np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = np.round(rows @ rows.T, 6)  # Rounded, so that equal vectors tie whatever the order of addition.
    nearest = np.full(len(ranked), -np.inf)
    left = np.ones(len(ranked), dtype=bool)
    order: list[int] = []
    while len(order) < min(limit, len(ranked)):
        penalty = nearest if order else 0.0
        gain = np.where(left, (1.0 - diversity) * relevance - diversity * penalty, -np.inf)
        best = int(gain.argmax())
        order.append(best)
        left[best] = False
        nearest = np.maximum(nearest, cosines[best])
    return [ranked[i] for i in (*order, *np.flatnonzero(left))]
