"""What the embedding service tells Prometheus besides its batches: requests, models, the cache, and the names others use."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.metrics_core import GaugeMetricFamily

from services.common.batching import BatchObservation, Lane
from services.common.batching.metrics import BatchMetrics
from services.common.metrics import Metrics, summed
from services.embedding.registry import ModelRegistry

EMBED_ROUTES = frozenset(
    {
        "/embed",
        "/v1/embeddings",
        "/tei",
        "/tei/",
        "/tei/embed",
        "/tei/embeddings",
        "/tei/invocations",
        "/tei/embed_all",
        "/tei/similarity",
        "/tei/v1/embeddings",
        "/api/v1/embed",
        "/api/v1/embeddings/embed",
        "/api/v1/embeddings/embed_batch",
    }
)
TOKEN_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192, 32_768, 131_072, 524_288)


class EmbeddingMetrics(BatchMetrics):
    """Hears of batches, replies, cache look-ups, loads and unloads; `report` tells what the registry holds."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(metrics, "embedding")
        self._metrics = metrics
        self._request_tokens = metrics.histogram(
            "tercet_embedding_request_tokens", "Tokens of one request that the model read.", buckets=TOKEN_BUCKETS
        )
        self._batch_tokens = metrics.histogram(
            "tercet_embedding_batch_tokens", "Tokens of one batch, padding included.", buckets=TOKEN_BUCKETS
        )
        cache = metrics.counter(
            "tercet_embedding_cache_texts_total", "Texts looked up in the vector cache.", ("result",), ("hit", "miss")
        )
        self._hits, self._misses = cache.labels("hit"), cache.labels("miss")
        self._loads = metrics.counter(
            "tercet_embedding_model_loads_total", "Models loaded, or not.", ("result",), ("ok", "failed")
        )
        self._load_seconds = metrics.histogram(
            "tercet_embedding_model_load_seconds",
            "Time to load a model and warm it up.",
            buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
        )
        self._unloads = metrics.counter(
            "tercet_embedding_model_evictions_total", "Models unloaded.", ("reason",), ("memory", "idle")
        )

    def _batch(self, batch: BatchObservation) -> None:
        super()._batch(batch)
        self._batch_tokens.observe(batch.padded_tokens)

    def replied(self, tokens: int) -> None:
        """See EmbedderObserver."""
        self._request_tokens.observe(tokens)

    def looked_up(self, hits: int, misses: int) -> None:
        """See EmbedderObserver."""
        self._hits.inc(hits)
        self._misses.inc(misses)

    def loaded(self, seconds: float) -> None:
        """See RegistryObserver."""
        self._loads.labels("ok").inc()
        self._load_seconds.observe(seconds)

    def load_failed(self) -> None:
        """See RegistryObserver."""
        self._loads.labels("failed").inc()

    def unloaded(self, reason: str) -> None:
        """See RegistryObserver."""
        self._unloads.labels(reason).inc()

    def report(self, models: ModelRegistry) -> None:
        """Report what *models* hold, and everything under the names that others use too."""
        self._metrics.gauge(
            "tercet_embedding_models_bytes", "Memory that the weights of loaded models take.", models.resident_bytes
        )
        self._metrics.gauge("tercet_embedding_models", "Models in memory.", lambda: len(models.loaded()))
        self._metrics.registry.register(_OtherNames(self._metrics, self._parts(), self._waiting))

    def _waiting(self) -> float:
        return sum(self._depth(lane) for lane in Lane)

    def _parts(self) -> dict[str, list[Histogram]]:
        """Return our histograms by Text Embeddings Inference's names for them."""
        return {
            "te_request_tokenization_duration": list(self._tokenised.values()),
            "te_request_queue_duration": list(self._queued.values()),
            "te_request_inference_duration": [self._seconds],
            "te_request_input_length": [self._request_tokens],
            "te_batch_next_size": [self._items],
            "te_batch_next_tokens": [self._batch_tokens],
        }


class _OtherNames:
    """The same figures under the reference architecture's names and under Text Embeddings Inference's."""

    def __init__(
        self, metrics: Metrics, parts: Mapping[str, Sequence[Histogram]], waiting: Callable[[], float]
    ) -> None:
        self._metrics = metrics
        self._parts = parts
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """Yield the families, made from our own when they are asked for."""
        statuses = self._statuses()
        requests = CounterMetricFamily("embedding_requests", "Embedding requests by status.", labels=["status"])
        for status, count in sorted(statuses.items()):
            requests.add_metric([status], count)
        yield requests
        good = sum(count for status, count in statuses.items() if status < "400")
        total = sum(statuses.values())
        for name, value in (("count", total), ("success", good), ("failure", total - good)):
            yield UnknownMetricFamily(f"te_request_{name}", "Embedding requests.", value)
        buckets, seconds = summed([self._metrics.request_seconds], EMBED_ROUTES)
        for name in ("embedding_latency_seconds", "te_request_duration"):
            yield HistogramMetricFamily(name, "Time to answer an embedding request.", buckets, seconds)
        for name, histograms in self._parts.items():
            yield HistogramMetricFamily(name, "See the histogram of ours.", *summed(histograms))
        yield GaugeMetricFamily("te_queue_size", "Texts without a result yet.", self._waiting())

    def _statuses(self) -> dict[str, float]:
        counts = defaultdict(float, {"200": 0.0})
        for family in self._metrics.requests.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and sample.labels["route"] in EMBED_ROUTES:
                    counts[sample.labels["status"]] += sample.value
        return counts
