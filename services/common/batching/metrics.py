"""What batchers tell Prometheus."""

import sys
from functools import partial
from typing import Any
from weakref import WeakSet

from services.common.batching.batcher import Batcher
from services.common.batching.engine import BatchObservation
from services.common.batching.queue import Lane
from services.common.metrics import Metrics


class BatchMetrics:
    """The batch metrics of *work* (`embedding`, `rerank`), summed over the batchers that are watched."""

    def __init__(self, metrics: Metrics, work: str) -> None:
        lanes = tuple(Lane)
        self._batchers: WeakSet[Batcher[Any, Any]] = WeakSet()
        self._seconds = metrics.histogram(f"tercet_{work}_inference_seconds", "Time the model took for one batch.")
        self._items = metrics.histogram(
            f"tercet_{work}_batch_items", "Items in one batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
        )
        tokens = metrics.counter(f"tercet_{work}_tokens_total", "Tokens asked for, by lane.", ("lane",), lanes)
        self._padding = metrics.counter(f"tercet_{work}_padding_tokens_total", "Tokens computed for padding alone.")
        text = "Items that were under way already for somebody, and were computed once."
        coalesced = metrics.counter(f"tercet_{work}_coalesced_items_total", text, ("lane",), lanes)
        text = "Time an item waited for the model, tokenised."
        queued = metrics.histogram(f"tercet_{work}_queue_seconds", text, ("lane",))
        text = "Time to tokenise a submission, or a chunk of a large one, waiting for a thread included."
        tokenised = metrics.histogram(f"tercet_{work}_tokenization_seconds", text, ("lane",))
        # Looked up once: a lookup costs as much as an observation.
        self._tokens = {lane: tokens.labels(lane) for lane in Lane}
        self._coalesced = {lane: coalesced.labels(lane) for lane in Lane}
        self._queued = {lane: queued.labels(lane) for lane in Lane}
        self._tokenised = {lane: tokenised.labels(lane) for lane in Lane}
        for lane in Lane:
            text = f"Items of the {lane} lane without a result yet."
            metrics.gauge(f"tercet_{work}_{lane}_queue_items", text, partial(self._depth, lane))
        text = "on the first GPU, by whomever; 0 without one."
        metrics.gauge("gpu_memory_used_bytes", f"Memory in use {text}", lambda: gpu_memory_bytes()[0])
        metrics.gauge("gpu_memory_total_bytes", f"Memory there is {text}", lambda: gpu_memory_bytes()[1])

    def watch(self, batcher: Batcher[Any, Any]) -> None:
        """Have *batcher* tell what it does, for as long as it is in use."""
        self._batchers.add(batcher)
        batcher.observe = self._batch
        batcher.observe_tokenised = lambda lane, seconds: self._tokenised[lane].observe(seconds)
        batcher.observe_coalesced = lambda lane, items: self._coalesced[lane].inc(items)

    def _batch(self, batch: BatchObservation) -> None:
        self._seconds.observe(batch.seconds)
        self._items.observe(batch.items)
        self._tokens[batch.lane].inc(batch.tokens)
        self._padding.inc(batch.padded_tokens - batch.tokens)
        for wait_s in batch.waits_s:
            self._queued[batch.lane].observe(wait_s)

    def _depth(self, lane: Lane) -> int:
        return sum(batcher.depth(lane) for batcher in self._batchers)


def gpu_memory_bytes() -> tuple[float, float]:
    """Return how much of the first GPU's memory is in use, by whomever, and all of it; 0 without one, or before torch is used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info()
    return float(total - free), float(total)
