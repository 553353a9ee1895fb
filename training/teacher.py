"""The teacher: a mixture of late interaction, dense and lexical scores, which ranks better than any of them alone."""

import numpy as np

from training.candidates import Floats, Prepared, Row
from training.data import Kind
from training.recipe import Recipe

_ENOUGH_CANDIDATES = 6
_SAMPLED_ROWS = 2000


class Teacher:
    """Scores the candidates of one collection's questions, and says what the student should make of them."""

    def __init__(self, prepared: Prepared, recipe: Recipe) -> None:
        trained = [row for q, row in zip(prepared.questions, prepared.rows, strict=True) if q.part == "train"]
        sample = [row for row in trained or prepared.rows if len(row.passages) >= _ENOUGH_CANDIDATES][:_SAMPLED_ROWS]
        self._recipe = recipe
        self._weights = [
            weight / max(1e-6, float(np.mean([getattr(row, name).std() for row in sample] or [1.0])))
            for weight, name in zip(recipe.mixture, ("maxsim", "dense", "bm25"), strict=True)
        ]

    def scores(self, row: Row) -> Floats:
        """Return the mixture for each candidate: comparable within a question only."""
        maxsim, dense, bm25 = self._weights
        made: Floats = maxsim * row.maxsim + dense * row.dense + bm25 * row.bm25
        return made

    def targets(self, scores: Floats, answer: int, kind: Kind) -> Floats:
        """Return the logits of the distribution to learn for candidates with these *scores*, one the *answer*."""
        targets: Floats = scores * self._recipe.sharpness
        targets[answer] += self._bonus(kind)
        return targets

    def _bonus(self, kind: Kind) -> float:
        if kind == "real":
            return self._recipe.known_bonus
        # Words taken from a passage may fit another one better.
        return 0.0 if kind == "keys" else self._recipe.cut_bonus
