"""What searches tell Prometheus: the time of each stage, the steps down, recall, and what reranking changes."""

import math
from collections import deque
from collections.abc import Iterator
from typing import get_args

from prometheus_client import Counter, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric

from services.common.metrics import LATENCY_BUCKETS_S, Metrics, summed
from services.common.wire.search import Degradation
from services.search.quality import Finished, Sample, agreement

STAGES = ("cache", "wait", "embed", "retrieve", "fuse", "fetch", "rerank", "hits", "total")
STAGE_BUCKETS_S = (0.0001, 0.00025, 0.0005, *LATENCY_BUCKETS_S)
RECALL_BUCKETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
RECENT = 200
SEARCH_ROUTES = frozenset({"/search", "/search/batch", "/msearch"})


class SearchMetrics:
    """The series of searches that the pipeline ran; those that the result cache answered are the cache's to count."""

    def __init__(self, metrics: Metrics) -> None:
        self._seconds = metrics.histogram(
            "tercet_search_stage_seconds", "Time of each stage of a search.", ("stage",), buckets=STAGE_BUCKETS_S
        )
        self._stages: dict[str, Histogram] = {stage: self._seconds.labels(stage) for stage in STAGES}
        self._answers: Counter = metrics.counter(
            "tercet_search_answers_total",
            "Searches answered by the pipeline: in full, degraded by some step down, or by an older answer.",
            ("outcome",),
            ("whole", "degraded", "stale"),
        )
        self._degraded: Counter = metrics.counter(
            "tercet_search_degraded_total", "Steps down taken, by reason.", ("reason",), get_args(Degradation)
        )
        self._missing: Counter = metrics.counter(
            "tercet_search_shards_missing_total", "Shards that were missing from answers."
        )
        self._recall = metrics.histogram(
            "tercet_retrieval_recall_at_10",
            "Share of the exact ten nearest that a live question's candidates had, on a sample.",
            buckets=RECALL_BUCKETS,
        )
        self._samples: Counter = metrics.counter(
            "tercet_retrieval_recall_samples_total",
            "Questions drawn to measure recall, by what became of them.",
            ("outcome",),
            get_args(Sample),
        )
        self._agreements: deque[float] = deque(maxlen=RECENT)
        metrics.gauge(
            "tercet_rerank_agreement",
            "Share of the first ten before reranking that are among the first ten after it: mean of the last 200, else NaN.",
            lambda: _mean(self._agreements),
        )
        self._recalls: deque[float] = deque(maxlen=RECENT)
        metrics.gauge(
            "retrieval_recall_at_10",
            "The reference architecture's name: mean of the last 200 samples of recall, NaN before any.",
            lambda: _mean(self._recalls),
        )
        metrics.registry.register(_SearchLatency(metrics))

    def note_stage(self, stage: str, seconds: float) -> None:
        """Note how long a stage took."""
        series = self._stages.get(stage)
        if series is None:
            series = self._stages[stage] = self._seconds.labels(stage)
        series.observe(seconds)

    def finished(self, finished: Finished) -> None:
        """Count a search, its steps down, and what reranking changed."""
        reply = finished.reply
        self._answers.labels("stale" if reply.cache.stale else "degraded" if reply.degraded else "whole").inc()
        for reason in reply.degraded:
            self._degraded.labels(reason).inc()
        if finished.retrieved is not None:
            self._missing.inc(finished.retrieved.total - finished.retrieved.ok)
        agreed = agreement(finished.fused, finished.last)
        if agreed is not None:
            self._agreements.append(agreed)

    def note_recall(self, recall: float) -> None:
        """Note the recall of one sampled question."""
        self._recall.observe(recall)
        self._recalls.append(recall)

    def note_sample(self, sample: Sample) -> None:
        """Count a question drawn to measure recall."""
        self._samples.labels(sample).inc()


class _SearchLatency:
    """The time to answer a search, cached ones included, under the reference architecture's name."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the family, made from the requests' when it is asked for."""
        buckets, seconds = summed([self._metrics.request_seconds], SEARCH_ROUTES)
        yield HistogramMetricFamily("search_latency_seconds", "Time to answer a search request.", buckets, seconds)


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values) if values else math.nan
