"""
The cascade: late interaction orders the candidates, a cross-encoder takes the best of them as time allows; one score.

A document that both have scored has the score sigmoid(a·x + b·y + c) of their raw scores x and y, one that only the first
has scored sigmoid(d·x + e). The constants are fitted so that both are the same probability (J. Platt, "Probabilistic
outputs for support vector machines", 1999), which is what lets documents of the two kinds stand in one order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import numpy as np

from services.common.errors import Overloaded
from services.common.standardizing import standardized
from services.rerank.logits import logit_of, sigmoid
from services.rerank.ports import ScorerInfo
from services.rerank.scorer import Scorer
from services.rerank.scores import DocumentScore, RawScore, Scored, ScoreOptions

PRIOR_SHARE: Final = 0.4  # Retrieval's part in the choice when docs/rerank.md's table was measured.


class Blend(Protocol):
    """How two raw scores become one. *words* says so in words, *identity* tells it from others in a fingerprint."""

    @property
    def words(self) -> str:
        """It in words."""
        ...

    @property
    def identity(self) -> str:
        """A short name."""
        ...

    def logit(self, first: float, last: float | None) -> float:
        """Return the logit of the blended score; *last* is None where the second scorer did not come to the document."""
        ...


@dataclass(frozen=True, slots=True)
class FittedBlend:
    """What was fitted on judged queries: *both* is (a, b, c), *first* is (d, e)."""

    both: tuple[float, float, float]
    first: tuple[float, float]

    @property
    def words(self) -> str:
        """See Blend."""
        return "the sigmoid of a fitted sum of both raw scores, or of the first alone where time ran out"

    @property
    def identity(self) -> str:
        """See Blend."""
        return sha256(repr((self.both, self.first)).encode()).hexdigest()[:8]

    def logit(self, first: float, last: float | None) -> float:
        """See Blend."""
        if last is None:
            return self.first[0] * first + self.first[1]
        return self.both[0] * first + self.both[1] * last + self.both[2]


@dataclass(frozen=True, slots=True)
class LastBeforeFirst:
    """
    What is done without fitted constants: the second scorer's order, then the first's.

    Its probability is mapped to the upper half of 0 to 1, the first's to the lower; nothing is calibrated.
    """

    first: Scorer
    last: Scorer

    @property
    def words(self) -> str:
        """See Blend."""
        return "from 0.5 to 1 by the second, or from 0 to 0.5 by the first alone where time ran out; not calibrated"

    @property
    def identity(self) -> str:
        """See Blend."""
        return "plain"

    def logit(self, first: float, last: float | None) -> float:
        """See Blend."""
        if last is None:
            return logit_of(self.first.backend.to_probability(first) / 2)
        return logit_of((1 + self.last.backend.to_probability(last)) / 2)


class Cascade:
    """Two scorers as one: *last* sees the best *most* of what *first* scored. Its raw score is the logit of the blended one."""

    def __init__(self, first: Scorer, last: Scorer, blend: Blend, *, most: int = 100) -> None:
        self._first, self._last, self._blend, self._most = first, last, blend, most
        one, two = first.info, last.info
        self.info = ScorerInfo(
            name=two.name,
            kind="cascade",
            score=f"{blend.words}. First, {one.name}: {one.score}. Second, for the best {most}, {two.name}: {two.score}",
            fingerprint=f"cascade/2:{one.fingerprint}+{two.fingerprint}+{blend.identity}+{most}",
            max_tokens=min(one.max_tokens, two.max_tokens),
            runtime=f"{one.runtime} + {two.runtime}",
            precision=f"{one.precision} + {two.precision}",
            labels=two.labels,
        )

    def to_probability(self, raw: float) -> float:
        """Return the blended score from its logit."""
        return sigmoid(raw)

    async def score(self, query: str, texts: Sequence[str], options: ScoreOptions) -> Scored:
        """
        Score *texts*: the first scorer all of them in the order given, the second the best of those, best first.
        With *priors* the best are those by a sum of both.

        Of the time there is the first takes what it needs: an order of all candidates is worth more than a better one
        of some. With *allow_partial* a second scorer whose queue is full is done without, too. Raises: As Scorer.raw.
        """
        before = await self._first.raw(query, texts, options)
        order = _best(before.documents, options.priors)[: self._most]
        timings, cut = before.timings, before.query_cut
        last: dict[int, RawScore | None] = {}
        try:
            after = await self._last.raw(query, [texts[index] for index in order], options)
            timings.add(after.timings)
            cut = cut or after.query_cut
            last = dict(zip(order, after.documents, strict=True))
        except Overloaded:
            if not options.allow_partial:
                raise
        documents = [
            None if one is None else self._joined(one, last.get(index)) for index, one in enumerate(before.documents)
        ]
        every = [one for one in (*before.documents, *last.values()) if one is not None]
        return Scored(
            documents,
            query_cut=cut,
            tokens=sum(one.tokens for one in every),
            cached_tokens=sum(one.tokens for one in every if one.cached),
            tokenization_ms=timings.tokenization_ms,
            queue_ms=timings.queue_ms,
            inference_ms=timings.inference_ms,
        )

    def _joined(self, first: RawScore, last: RawScore | None) -> DocumentScore:
        decisive = last or first
        return DocumentScore(
            score=self._blend.logit(first.raw, last.raw if last else None),
            tokens=first.tokens + (last.tokens if last else 0),
            passages_scored=decisive.passages,
            best_passage=decisive.best_passage,
            complete=first.complete and decisive.complete,
            cached=first.cached and decisive.cached,
            stage="last" if last else "first",
        )


def _best(documents: Sequence[RawScore | None], priors: Sequence[float] | None) -> list[int]:
    """Return the places of the *documents* that have a score, best first, by it and by their *priors*."""
    there = [index for index, one in enumerate(documents) if one is not None]
    values = np.array([one.raw for one in documents if one is not None])
    if priors is not None:
        beside = np.array([priors[index] for index in there])
        values = (1 - PRIOR_SHARE) * standardized(values) + PRIOR_SHARE * standardized(beside)
    return [there[at] for at in np.argsort(-values, kind="stable")]
