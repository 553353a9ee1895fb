"""The use case: score documents against a query, the likeliest first, in the time there is."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.batching import Batcher, Lane
from services.common.deadline import Deadline
from services.common.errors import BackendFailed, NotFound
from services.common.tracing import record_work
from services.rerank.ports import Backend, Pair, PreparedPair, ScorerInfo

# Documents are given likeliest first; sorting by length within a short window keeps them roughly so.
SORT_WINDOW = 32


@dataclass(frozen=True, slots=True)
class Scored:
    """A score for each document in the order given, None where the deadline came first; *tokens* counts scored pairs."""

    scores: list[float | None]
    tokens: int
    tokenization_ms: float
    queue_ms: float
    inference_ms: float

    def ranking(self) -> list[int]:
        """Return document positions: scored ones by falling score, then unscored ones in the order given."""
        scored = [(-score, index) for index, score in enumerate(self.scores) if score is not None]
        unscored = [index for index, score in enumerate(self.scores) if score is None]
        return [index for _, index in sorted(scored)] + unscored


class _RerankEngine:
    """A backend as the batcher sees it; an output is the raw score with the tokens it took."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def prepare(self, items: Sequence[Pair]) -> list[PreparedPair]:
        return self._backend.prepare(items)

    def tokens(self, prepared: PreparedPair) -> int:
        return prepared.cost_tokens

    def run(self, batch: Sequence[PreparedPair]) -> list[tuple[float, int]]:
        scores = self._backend.score(batch)
        if any(score != score for score in scores):
            raise BackendFailed("The model gave a score that is not a number")
        return [(score, pair.tokens) for score, pair in zip(scores, batch, strict=True)]


class Reranker:
    """One scorer behind one batcher."""

    def __init__(
        self, backend: Backend, *, max_batch_tokens: int, max_queue_items: int, tokenizer_threads: int, hang_s: float
    ) -> None:
        self.info: ScorerInfo = backend.info
        self._backend = backend
        self.batcher: Batcher[Pair, tuple[float, int]] = Batcher(
            _RerankEngine(backend),
            max_batch_tokens=max_batch_tokens,
            max_queue_items=max_queue_items,
            sort_window=SORT_WINDOW,
            tokenizer_threads=tokenizer_threads,
            hang_s=hang_s,
        )

    def check_model(self, name: str | None) -> None:
        """Do nothing if *name* is this scorer's, or None. Raises NotFound with the names there are."""
        if name is not None and name not in (self.info.name, self.info.name.rsplit("/", 1)[-1]):
            raise NotFound(f"There is no model {name[:100]!r}; there is: {self.info.name}", param="model")

    async def score(
        self,
        query: str,
        texts: Sequence[str],
        *,
        lane: Lane,
        deadline: Deadline,
        raw: bool = False,
        allow_partial: bool = False,
    ) -> Scored:
        """
        Score *texts* against *query*; values from 0 to 1 unless *raw*.

        Raises:
            InvalidInput: The query is longer than the scorer reads.
            DeadlineExceeded: Time ran out, and *allow_partial* is false.
            Overloaded, BackendFailed, NotReady: As Batcher.submit.
        """
        pairs = [Pair(query, text) for text in texts]
        # A pair is its own key: equal pairs in flight are scored once.
        done = await self.batcher.submit(pairs, lane=lane, deadline=deadline, allow_partial=allow_partial, keys=pairs)
        record_work(done)
        finish = (lambda score: score) if raw else self._backend.to_probability
        return Scored(
            scores=[None if output is None else finish(output[0]) for output in done.outputs],
            tokens=sum(output[1] for output in done.outputs if output is not None),
            tokenization_ms=done.tokenization_ms,
            queue_ms=done.queue_ms,
            inference_ms=done.inference_ms,
        )
