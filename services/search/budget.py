"""
A search's time, split over its stages by how long each has lately taken: pure arithmetic, told what was measured.

A stage may use the time left × its usual time / (its own and those of the stages after it), so that all of them have slack
alike. Reranking is elastic and counts with a few pairs only: in the end it gets what is left, and its measured cost per
pair says for how many candidates that is enough.
"""

from typing import Final, Literal

from services.common.quantile import RollingQuantile

Stage = Literal["embed", "retrieve", "hits"]

WINDOW: Final = 64
REFRESH: Final = 8
MOST_CAUTION: Final = 16.0
FEW_PAIRS: Final = 3
CALL_PAIRS: Final = 4  # A call to the reranker costs as much as so many pairs before it scores the first.
MOST_PAIRS: Final = 10_000
PATIENCE: Final = 10.0  # times what is usual: who has not answered then is not slow, but stuck.
LEAST_FINISH_S: Final = 0.01
# Before anything was measured.
PRIORS_S: Final[dict[Stage, float]] = {"embed": 0.02, "retrieve": 0.02, "hits": 0.003}
PRIOR_PAIR_S: Final = 0.004
# Of the time left, at least: without shards there is no answer, whatever is left after them; a vector can be done without.
LEAST_SHARE: Final = 0.5
# A shard that hangs takes all that retrieval is given: besides what is usual, so much is left to those that answered.
AFTER_SHARE: Final = 0.15
AFTER_MOST_S: Final = 0.15
# A vector has ten times its usual time, and time for a hitch, if that is no more than a quarter of what is left: while a
# shard hangs retrieval takes long, and a share in proportion would be short.
EASY_TIMES: Final = 10.0
EASY_S: Final = 0.25
EASY_SHARE: Final = 0.25
MOST_FOR_A_VECTOR: Final = 0.5  # … and at most: an embedding service that hangs must not take the reranker's time too.
_AFTER: Final[dict[Stage, tuple[Stage, ...]]] = {"embed": ("retrieve", "hits"), "retrieve": ("hits",)}


class Usual:
    """
    How long something usually takes: the 95th percentile of its last 64 times, *prior_s* until there are eight.

    Being late in a time that should have been enough doubles it, up to sixteenfold, and being in time halves that again:
    so a stage that has become slow is soon given more, and one that was away a while is soon believed again.
    """

    def __init__(self, prior_s: float) -> None:
        self._percentile = RollingQuantile(0.95, window=WINDOW, refresh=REFRESH, least=REFRESH)
        self._prior_s = prior_s
        self._caution = 1.0

    @property
    def measured_s(self) -> float:
        """The percentile alone: what others keep back for it, who are not to suffer for its being late."""
        return self._prior_s if self._percentile.value is None else self._percentile.value

    @property
    def seconds(self) -> float:
        """The estimate."""
        return self.measured_s * self._caution

    def note(self, seconds: float) -> None:
        """Take note that it took *seconds*, more than none, and was in time."""
        self._percentile.note(seconds)
        self._caution = max(1.0, self._caution / 2)

    def note_late(self, given_s: float) -> None:
        """Take note that it was not done in *given_s*, which says something only where that is what it usually takes."""
        if given_s >= self.seconds:
            self._caution = min(MOST_CAUTION, self._caution * 2)


class Budget:
    """
    What the stages of this process's searches usually take, and what that leaves to each of them.

    *patience_s*: embedding and reranking, which can be done without, are waited for so long, or ten times what is usual
    if that is more, even where more time is left.
    """

    def __init__(self, *, patience_s: float = 1.0) -> None:
        self._patience_s = patience_s
        self._usual: dict[Stage, Usual] = {stage: Usual(prior_s) for stage, prior_s in PRIORS_S.items()}
        self._pair = Usual(PRIOR_PAIR_S)

    def note(self, stage: Stage, seconds: float) -> None:
        """Take note of the time of a *stage* that did its work."""
        self._usual[stage].note(seconds)

    def note_late(self, stage: Stage, given_s: float) -> None:
        """Take note of a *stage* that was not done in the time it was given."""
        self._usual[stage].note_late(given_s)

    def note_reranked(self, pairs: int, seconds: float) -> None:
        """Take note of a call that scored *pairs*, at least one."""
        self._pair.note(seconds / (CALL_PAIRS + pairs))

    def note_rerank_late(self, pairs: int, given_s: float) -> None:
        """Take note of a call for *pairs* that scored none in the time it was given."""
        self._pair.note_late(given_s / (CALL_PAIRS + pairs))

    def allowed_s(self, stage: Literal["embed", "retrieve"], remaining_s: float, *, rerank: bool) -> float:
        """
        Return how long *stage* may take of the *remaining_s*, *rerank* saying whether reranking comes after it.

        What the stages usually take that the step down after it needs is kept back; 0 where nothing is left for it.
        """
        own_s = self._usual[stage].seconds
        after_s = sum([self._usual[later].measured_s for later in _AFTER[stage]])
        pairs_s = self._rerank_s(FEW_PAIRS) if rerank else 0.0
        fair_s = remaining_s * own_s / (own_s + after_s + pairs_s)
        if stage == "retrieve":
            after_s += min(AFTER_SHARE * remaining_s, AFTER_MOST_S)
            return max(min(fair_s, remaining_s - after_s), LEAST_SHARE * remaining_s, 0.0)
        fair_s = max(fair_s, min(max(EASY_S, EASY_TIMES * own_s), EASY_SHARE * remaining_s))
        allowed_s = min(fair_s, remaining_s - after_s, MOST_FOR_A_VECTOR * remaining_s, self._waited_for_s(own_s))
        return max(0.0, allowed_s)

    def affordable(self, remaining_s: float) -> int:
        """Return how many candidates can be reranked, and the hits read after that, in *remaining_s*; 0 for none."""
        left_s = remaining_s - self._finish_s()
        if left_s <= 0:
            return 0
        pairs = left_s / self._pair.seconds - CALL_PAIRS
        return int(min(MOST_PAIRS, max(1.0, pairs)))

    def rerank_s(self, pairs: int, remaining_s: float) -> float:
        """Return how long reranking *pairs* may take, so that time is left to read the hits; 0 where none is."""
        return max(0.0, min(remaining_s - self._finish_s(), self._waited_for_s(self._rerank_s(pairs))))

    def _rerank_s(self, pairs: int) -> float:
        return self._pair.seconds * (CALL_PAIRS + pairs)

    def _finish_s(self) -> float:
        return max(LEAST_FINISH_S, 2 * self._usual["hits"].seconds)

    def _waited_for_s(self, usual_s: float) -> float:
        return max(self._patience_s, PATIENCE * usual_s)
