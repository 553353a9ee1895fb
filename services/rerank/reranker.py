"""The use case: score documents against a query, the likeliest first, in the time there is; or classify texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from services.common.batching import Lane
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import InvalidInput, NotFound
from services.common.tracing import record_work
from services.rerank.cascade import Cascade
from services.rerank.ports import ScorerInfo
from services.rerank.scorer import Row, Scorer, problems_of
from services.rerank.scores import (
    DocumentScore,
    LongDocuments,
    Scored,
    ScoreOptions,
    ScoringObserver,
)

__all__ = ["Classified", "DocumentScore", "LongDocuments", "Reranker", "Scored"]


@dataclass(frozen=True, slots=True)
class Classified:
    """For each input, in order, its labels with their scores, the best first; *tokens* counts what the model read."""

    rows: list[list[tuple[str, float]]]
    tokens: int
    tokenization_ms: float
    queue_ms: float
    inference_ms: float


class _Ranker(Protocol):
    """One scorer, or two as one; `score` gives raw scores."""

    @property
    def info(self) -> ScorerInfo: ...

    async def score(self, query: str, texts: Sequence[str], options: ScoreOptions) -> Scored: ...

    def to_probability(self, raw: float) -> float: ...


class _Alone:
    """One scorer."""

    def __init__(self, scorer: Scorer) -> None:
        self.info = scorer.info
        self.to_probability = scorer.backend.to_probability
        self._scorer = scorer

    async def score(self, query: str, texts: Sequence[str], options: ScoreOptions) -> Scored:
        made = await self._scorer.raw(query, texts, options)
        documents = [
            one and DocumentScore(one.raw, one.tokens, one.passages, one.best_passage, one.complete, one.cached, "last")
            for one in made.documents
        ]
        there = [one for one in documents if one is not None]
        return Scored(
            documents,
            query_cut=made.query_cut,
            tokens=sum(one.tokens for one in there),
            cached_tokens=sum(one.tokens for one in there if one.cached),
            tokenization_ms=made.timings.tokenization_ms,
            queue_ms=made.timings.queue_ms,
            inference_ms=made.timings.inference_ms,
        )


class Reranker:
    """
    One scorer, or several of which the last has the last word: with two, *cascade* is what they make together.

    *long_documents* is what is done where a request does not say; *observer* hears of requests.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        cascade: Cascade | None = None,
        *,
        long_documents: LongDocuments = "windows",
        observer: ScoringObserver | None = None,
    ) -> None:
        self._scorers = scorers
        self._last = scorers[-1]
        self._ranker: _Ranker = cascade or _Alone(self._last)
        self._long_documents = long_documents
        self._observer = observer
        self.info: ScorerInfo = self._ranker.info

    def check_model(self, name: str | None) -> None:
        """Do nothing if *name* is this scorer's, or None. Raises NotFound with the names there are."""
        if name is not None and name not in (self.info.name, self.info.name.rsplit("/", 1)[-1]):
            raise NotFound(f"There is no model {name[:100]!r}; there is: {self.info.name}", param="model")

    def problems(self) -> Sequence[str]:
        """Return why this process should be replaced."""
        return problems_of(self._scorers)

    def waiting(self, lane: Lane) -> int:
        """Return how many documents of *lane* were admitted and have no score yet."""
        return sum(one.waiting(lane) for one in self._scorers)

    async def start(self) -> None:
        """Start the scorers, measure what batches cost and warm up (seconds, for real models)."""
        for one in self._scorers:
            await one.start()
        options = ScoreOptions(Lane.QUERY, NO_DEADLINE)
        if self.info.ranks:
            await self._ranker.score("warm up", ["a document"], options)

    async def aclose(self) -> None:
        """Finish what is queued, stop, and give the models' memory back."""
        for one in self._scorers:
            await one.aclose()

    async def score(
        self,
        query: str,
        texts: Sequence[str],
        *,
        lane: Lane,
        deadline: Deadline,
        raw: bool = False,
        allow_partial: bool = False,
        caller: str = "",
        long_documents: LongDocuments | None = None,
        max_document_tokens: int | None = None,
        priors: Sequence[float] | None = None,
    ) -> Scored:
        """
        Score *texts* against *query*, the first ones first; values from 0 to 1 unless *raw*. See ScoreOptions for the rest.

        Raises:
            InvalidInput: The model is a classifier whose labels say nothing about relevance.
            DeadlineExceeded: Time ran out, and *allow_partial* is false.
            Overloaded, BackendFailed, OutOfMemory, NotReady: As Scorer.raw.
        """
        if not self.info.ranks:
            raise InvalidInput(
                f"{self.info.name} tells {len(self.info.labels)} labels apart and does not rank; send texts to /tei/predict",
                param="model",
            )
        reading = long_documents or self._long_documents
        options = ScoreOptions(lane, deadline, allow_partial, caller, reading, max_document_tokens, priors)
        scored = await self._ranker.score(query, texts, options)
        record_work(scored)
        if self._observer is not None:
            _tell(self._observer, scored)
        if raw:
            return scored
        finish = self._ranker.to_probability
        return replace(scored, documents=[one and replace(one, score=finish(one.score)) for one in scored.documents])

    async def classify(
        self,
        inputs: Sequence[tuple[str, str | None]],
        *,
        lane: Lane,
        deadline: Deadline,
        raw: bool = False,
        caller: str = "",
    ) -> Classified:
        """
        Return the labels of each text, or text and second text: probabilities that add up to 1, the model's own outputs if *raw*.

        A text over what the model reads is cut.

        Raises:
            InvalidInput: The model has one label only.
            DeadlineExceeded, Overloaded, BackendFailed, OutOfMemory, NotReady: As Scorer.classify.
        """
        labels = self._last.info.labels
        if len(labels) < 2:
            raise InvalidInput(
                f"{self.info.name} is no classifier: it has one output, a score of relevance; use /rerank",
                param="model",
            )
        rows, timings = await self._last.classify(inputs, ScoreOptions(lane, deadline, caller=caller))
        done = Classified(
            [_labelled(labels, row, raw) for row, _ in rows],
            tokens=sum(tokens for _, tokens in rows),
            tokenization_ms=timings.tokenization_ms,
            queue_ms=timings.queue_ms,
            inference_ms=timings.inference_ms,
        )
        record_work(done)
        return done


def _labelled(labels: Sequence[str], row: Row, raw: bool) -> list[tuple[str, float]]:
    """Return *labels* with their outputs, or their softmax, the best first."""
    values = row.astype(np.float64)
    if not raw:
        shares = np.exp(values - values.max())
        values = shares / shares.sum()
    return sorted(zip(labels, values.tolist(), strict=True), key=lambda one: -one[1])


def _tell(observer: ScoringObserver, scored: Scored) -> None:
    """Have *observer* hear what became of a request's documents."""
    there = [one for one in scored.documents if one is not None]
    last = sum(one.stage == "last" for one in there)
    known = sum(one.cached for one in there)
    observer.looked_up(known, len(there) - known)
    observer.scored(last, len(there) - last, len(scored.documents) - len(there))
