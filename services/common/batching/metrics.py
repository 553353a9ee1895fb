"""What a batcher tells Prometheus."""

from functools import partial
from typing import Any

from services.common.batching.batcher import Batcher, BatchObservation
from services.common.batching.queue import Lane
from services.common.metrics import Metrics


def observe_batches(batcher: Batcher[Any, Any], metrics: Metrics, work: str) -> None:
    """Register the batch metrics of *work* (`embedding`, `rerank`) and have *batcher* keep them."""
    seconds = metrics.histogram(f"tercet_{work}_inference_seconds", "Time the model took for one batch.")
    items = metrics.histogram(
        f"tercet_{work}_batch_items", "Items in one batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
    )
    tokens = metrics.counter(f"tercet_{work}_tokens_total", "Tokens asked for, by lane.", ("lane",), tuple(Lane))
    padding = metrics.counter(f"tercet_{work}_padding_tokens_total", "Tokens computed for padding alone.")
    for lane in Lane:
        text = f"Items of the {lane} lane without a result yet."
        metrics.gauge(f"tercet_{work}_{lane}_queue_items", text, partial(batcher.depth, lane))

    def observe(batch: BatchObservation) -> None:
        seconds.observe(batch.seconds)
        items.observe(batch.items)
        tokens.labels(batch.lane).inc(batch.tokens)
        padding.inc(batch.padded_tokens - batch.tokens)

    batcher.observe = observe
