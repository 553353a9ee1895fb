"""What the rerank service tells Prometheus besides its batches: what became of documents, and what was known of them."""

from services.common.batching import Lane
from services.common.batching.metrics import BatchMetrics
from services.common.metrics import Metrics
from services.rerank.reranker import Reranker


class RerankMetrics(BatchMetrics):
    """Hears of batches and of scored documents; `report` tells what waits."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(metrics, "rerank")
        self._reranker: Reranker | None = None
        known = metrics.counter(
            "tercet_rerank_cache_documents_total",
            "Scored documents whose score was known (hit) or not.",
            ("result",),
            ("hit", "miss"),
        )
        self._hits, self._misses = known.labels("hit"), known.labels("miss")
        outcome = metrics.counter(
            "tercet_rerank_documents_total",
            "Documents by who had the last word: the last scorer, a cascade's first one, or the deadline.",
            ("outcome",),
            ("last", "first", "unscored"),
        )
        self._last, self._first, self._unscored = (outcome.labels(name) for name in ("last", "first", "unscored"))

    def looked_up(self, hits: int, misses: int) -> None:
        """See ScoringObserver."""
        self._hits.inc(hits)
        self._misses.inc(misses)

    def scored(self, last: int, first: int, unscored: int) -> None:
        """See ScoringObserver."""
        self._last.inc(last)
        self._first.inc(first)
        self._unscored.inc(unscored)

    def report(self, reranker: Reranker) -> None:
        """Report what waits in *reranker*: documents, not only those whose parts are with the batcher now."""
        self._reranker = reranker

    def _depth(self, lane: Lane) -> int:
        return self._reranker.waiting(lane) if self._reranker is not None else 0
