"""What the result cache tells Prometheus."""

from collections.abc import Callable

from services.common.metrics import Metrics
from services.search.kept_answers import CacheNotes

OUTCOMES = ("memory", "redis", "moved", "unproven", "absent", "unavailable")
AGES_S = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)


class CacheMetrics(CacheNotes):
    """The series of one process's result cache."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._looks = metrics.counter(
            "tercet_result_cache_lookups_total",
            "Searches that asked the result cache, by how that ended: memory and redis are hits.",
            ("outcome",),
            OUTCOMES,
        )
        self._ages = metrics.histogram(
            "tercet_result_cache_age_seconds", "Age of the answers that were given again.", buckets=AGES_S
        )
        self._joined = metrics.counter(
            "tercet_result_cache_joined_total",
            "Searches that shared an answer while it was made, by this process or another.",
            ("where",),
            ("process", "other"),
        )
        self._stale = metrics.counter(
            "tercet_result_cache_stale_total", "Older answers that were served, as nothing better could be made."
        )
        self._evictions = metrics.counter(
            "tercet_result_cache_evictions_total", "Entries that left the memory of this process for want of room."
        )

    def looked(self, outcome: str, age_s: float | None) -> None:
        """See CacheNotes."""
        self._looks.labels(outcome).inc()
        if age_s is not None:
            self._ages.observe(age_s)

    def joined(self, where: str) -> None:
        """See CacheNotes."""
        self._joined.labels(where).inc()

    def stale(self) -> None:
        """See CacheNotes."""
        self._stale.inc()

    def evicted(self) -> None:
        """Count an entry that went for want of room."""
        self._evictions.inc()

    def show(self, used_bytes: Callable[[], float], entries: Callable[[], float]) -> None:
        """Show how much there is in this process's memory whenever somebody looks."""
        self._metrics.gauge("tercet_result_cache_bytes", "Memory that cached results take in this process.", used_bytes)
        self._metrics.gauge("tercet_result_cache_entries", "Results cached in this process.", entries)
