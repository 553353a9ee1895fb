"""
How well a student ranks what retrieval proposes, alone and blended, on questions that were never trained on.

The 30 best candidates of dense + BM25 are reordered; the measure is nDCG@10 over all judged questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sentence_transformers import CrossEncoder

from services.common.standardizing import standardized
from services.search.settings import SearchSettings
from tercet.evaluation import measure
from training.calibration import fit_sigmoid
from training.candidates import Floats, Prepared, Row, hybrid
from training.data import Part
from training.model import score
from training.recipe import Recipe
from training.teacher import Teacher

Say = Callable[[str], None]

CANDIDATES = 30
RRF_K = 60
CROSS_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BLEND = float(SearchSettings.model_fields["rerank_blend"].default)
RERANK_SHARES = sorted({0.3, 0.5, 0.7, BLEND})
AS_SEARCH_RANKS = f"hybrid, {BLEND:g} cascade"
MAIN_WAYS = ("equal RRF", "hybrid without rerank", "MaxSim", "cross-encoder", "cascade", AS_SEARCH_RANKS)
MAXSIM_SHARE = 0.5  # Of the shipped cascade, both by their usual spread; README.md says why it is not fitted.
_NDCG = "nDCG@10"


class Scored(NamedTuple):
    """A question's best candidates by retrieval: *row* has their first scores, *logits* the student's."""

    answers: frozenset[int]
    fused: list[int]
    row: Row
    hybrid: Floats
    mixture: Floats
    logits: Floats


@dataclass(frozen=True)
class Cascade:
    """How scores become one probability: of MaxSim and logit (*both*), of MaxSim where there is no logit (*first*)."""

    both: tuple[float, float, float]
    first: tuple[float, float]

    def blended(self, scored: Scored) -> Floats:
        """Return the logit of the probability of each candidate."""
        sum_ = self.both[0] * scored.row.maxsim + self.both[1] * scored.logits + self.both[2]
        made: Floats = sum_.astype(np.float32)
        return made


def score_part(
    prepared: Prepared, part: Part, student: CrossEncoder, recipe: Recipe, *, keep: Path, most: int | None = None
) -> list[Scored]:
    """
    Return the first *most* questions of *part* with the student's logits; they are kept in the file *keep*.

    The caller names *keep* after the student's and the candidates' checksums.
    """
    teacher = Teacher(prepared, recipe)
    chosen = [(q, row) for q, row in zip(prepared.questions, prepared.rows, strict=True) if q.part == part][:most]
    if not chosen:
        return []
    cut: list[tuple[Floats, Row]] = []
    for _, row in chosen:
        fused = hybrid(row)
        best = np.argsort(-fused, kind="stable")[:CANDIDATES]
        cut.append((fused[best], Row(row.passages[best], row.dense[best], row.bm25[best], row.maxsim[best])))
    passages = prepared.collection.passages
    if keep.is_file():
        logits = np.load(keep)
    else:
        pairs = [
            (q.text, passages[int(at)].whole)
            for (q, _), (_, row) in zip(chosen, cut, strict=True)
            for at in row.passages
        ]
        logits = score(student, pairs, max_tokens=recipe.max_tokens)
        keep.parent.mkdir(parents=True, exist_ok=True)
        np.save(keep, logits)
    ends = np.cumsum([len(row.passages) for _, row in cut])[:-1]
    return [
        Scored(frozenset(question.answers), reciprocal_ranks(whole), row, fused, teacher.scores(row), own)
        for (question, whole), (fused, row), own in zip(chosen, cut, np.split(logits, ends), strict=True)
    ]


def reciprocal_ranks(row: Row) -> list[int]:
    """Return passages by equal reciprocal rank fusion of dense and BM25 (Cormack et al., 2009, k = 60)."""
    total = np.zeros(len(row.passages))
    for scores in (row.dense, row.bm25):
        ranks = np.empty(len(scores))
        ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
        total += 1.0 / (RRF_K + ranks)
    return [int(at) for at in row.passages[np.argsort(-total, kind="stable")]]


def orders(scored: Scored, cascade: Cascade) -> dict[str, list[int]]:
    """Return the ways of ranking that are compared, each as passages, best first."""
    row = scored.row
    maxsim, logits, mixture = standardized(row.maxsim), standardized(scored.logits), standardized(scored.mixture)
    blended = standardized(cascade.blended(scored))
    ways = {
        "hybrid without rerank": scored.hybrid,
        "dense": row.dense,
        "BM25": row.bm25,
        "MaxSim": row.maxsim,
        "cross-encoder": scored.logits,
        "MaxSim + cross-encoder": maxsim + logits,
        "teacher": scored.mixture,
        **{f"teacher, {share} cross-encoder": (1 - share) * mixture + share * logits for share in CROSS_SHARES},
        "cascade": blended,
        **{
            f"hybrid, {share:g} cascade": (1 - share) * standardized(scored.hybrid) + share * blended
            for share in RERANK_SHARES
        },
    }
    ranked = {name: [int(at) for at in row.passages[np.argsort(-by, kind="stable")]] for name, by in ways.items()}
    return {"equal RRF": scored.fused, **ranked}


def ndcg(questions: Sequence[Scored], cascade: Cascade) -> dict[str, float]:
    """Return the mean nDCG@10 of each way of ranking; an answer that retrieval did not propose counts as missed."""
    qrels = {str(at): {str(answer): 1 for answer in scored.answers} for at, scored in enumerate(questions)}
    runs: dict[str, dict[str, list[str]]] = {}
    for at, scored in enumerate(questions):
        for way, order in orders(scored, cascade).items():
            runs.setdefault(way, {})[str(at)] = [str(passage) for passage in order]
    return {way: measure(qrels, run)[_NDCG] for way, run in runs.items()}


def fit_cascade(sets: Sequence[Sequence[Scored]], *, maxsim_share: float | None = None) -> Cascade:
    """
    Return the constants that fit the candidates of *sets* of questions best, each set counting the same.

    With *maxsim_share* the order is given, MaxSim's share of a sum in which each is divided by its usual spread among a
    question's candidates; fitted is which probability the sum stands for. Without, the likeliest share is found, too.
    """
    maxsim, logits, labels, weights = [], [], [], []
    for questions in sets:
        total = sum(len(scored.row.passages) for scored in questions)
        for scored in questions:
            maxsim.append(scored.row.maxsim)
            logits.append(scored.logits)
            labels.append([float(int(at) in scored.answers) for at in scored.row.passages])
            weights.append(np.full(len(scored.logits), 1.0 / total))
    columns = np.column_stack([np.concatenate(maxsim), np.concatenate(logits)]).astype(np.float64)
    truth, counts = np.concatenate(labels), np.concatenate(weights)
    d, e = fit_sigmoid(columns[:, :1], truth, counts)
    if maxsim_share is None:
        a, b, c = fit_sigmoid(columns, truth, counts)
    else:
        shares = np.array([maxsim_share, 1.0 - maxsim_share])
        parts = shares / _usual_spreads(sets)
        factor, c = fit_sigmoid((columns @ parts)[:, None], truth, counts)
        a, b = (factor * parts).tolist()
    return Cascade((a, b, c), (d, e))


def _usual_spreads(sets: Sequence[Sequence[Scored]]) -> Floats:
    """Return the mean deviations of MaxSim and the logit among a question's candidates, each set counting the same."""
    spreads = [
        (np.mean([one.row.maxsim.std() for one in questions]), np.mean([one.logits.std() for one in questions]))
        for questions in sets
    ]
    made: Floats = np.maximum(np.mean(spreads, axis=0), 1e-9)
    return made
