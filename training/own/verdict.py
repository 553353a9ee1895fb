"""How the held-back queries are ranked before and after training, query by query, and which model is the better one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from services.common.standardizing import standardized
from tercet.evaluation import measure
from training.candidates import Floats
from training.evaluate import BLEND, Cascade, Scored

NDCG = "nDCG@10"
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class Ranked:
    """nDCG@10 of each held-back query, in order: by the cross-encoder *alone*, and as *search* ranks with it."""

    alone: list[float]
    search: list[float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What training changed. *without* is nDCG@10 of the same queries without rerank."""

    before: Ranked
    after: Ranked
    without: list[float]

    @property
    def is_worse(self) -> bool:
        """Whether the trained model is worse in the mean, alone or in a search."""
        return any(
            _mean(after) < _mean(before) - _EQUAL
            for before, after in ((self.before.alone, self.after.alone), (self.before.search, self.after.search))
        )

    @property
    def is_worse_than_none(self) -> bool:
        """Whether a search ranks better without the trained model."""
        return _mean(self.after.search) < _mean(self.without) - _EQUAL

    def lines(self) -> list[str]:
        """Return the figures as lines."""
        head = f"{NDCG} of {len(self.without)} held-back queries"
        lines = [f"{head:<36}{'before':>8}{'after':>8}   queries better, worse (p of a sign test)"]
        for name, before, after in (
            ("the cross-encoder alone", self.before.alone, self.after.alone),
            (f"as search ranks (blend {BLEND:g})", self.before.search, self.after.search),
        ):
            better, worse = _signs(before, after)
            test = f"{better}, {worse} ({sign_test(better, worse):.3f})"
            lines.append(f"{name:<36}{_mean(before):>8.4f}{_mean(after):>8.4f}   {test}")
        lines.append(f"{'without rerank':<36}{_mean(self.without):>8.4f}{_mean(self.without):>8.4f}")
        return lines


def without_rerank(questions: Sequence[Scored], grades: Sequence[Mapping[int, int]]) -> list[float]:
    """Return nDCG@10 of each of *questions* as retrieval ranks it; *grades* are its judged passages."""
    return _each(questions, grades, [scored.hybrid for scored in questions])


def ranked(questions: Sequence[Scored], grades: Sequence[Mapping[int, int]], cascade: Cascade) -> Ranked:
    """Return nDCG@10 of each of *questions* by their logits, and as search blends what *cascade* makes of them."""
    blended = [
        (1 - BLEND) * standardized(scored.hybrid) + BLEND * standardized(cascade.blended(scored))
        for scored in questions
    ]
    return Ranked(_each(questions, grades, [scored.logits for scored in questions]), _each(questions, grades, blended))


def sign_test(better: int, worse: int) -> float:
    """Return how likely signs as unequal as these are by chance, two-sided; 1.0 where there are none."""
    count = better + worse
    tail = sum(comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, tail / 2 ** (count - 1)) if count else 1.0


def _each(questions: Sequence[Scored], grades: Sequence[Mapping[int, int]], scores: Sequence[Floats]) -> list[float]:
    found = []
    for scored, judged, by in zip(questions, grades, scores, strict=True):
        order = [str(at) for at in scored.row.passages[np.argsort(-by, kind="stable")]]
        qrels = {"q": {str(at): max(0, grade) for at, grade in judged.items()}}
        found.append(measure(qrels, {"q": order})[NDCG])
    return found


def _signs(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    changes = np.subtract(after, before)
    return int((changes > _EQUAL).sum()), int((changes < -_EQUAL).sum())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
