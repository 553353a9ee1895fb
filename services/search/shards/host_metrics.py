"""What a host of shards tells Prometheus; no label has a collection, as there may be thousands."""

from prometheus_client import Counter, Gauge

from services.common.metrics import Metrics
from services.search.shards.host import LocalHost

SEGMENT_KINDS = ("tail", "flat", "hnsw", "ivf", "codes")


class HostMetrics:
    """The series of a process's hosts, by the host's name, and of the router's calls to hosts."""

    def __init__(self, metrics: Metrics) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ("host",)) -> Gauge:
            return Gauge(name, text, labels, registry=metrics.registry)

        self._lag = gauge("tercet_shard_lag_operations", "Operations that the shard furthest behind lacks.")
        self._open = gauge("tercet_shards_open", "Shards that are open.")
        self._catching_up = gauge("tercet_shards_catching_up", "Open shards that lack what they should have by now.")
        self._age = gauge("tercet_shard_snapshot_age_seconds", "Age of the oldest newest snapshot of a changed shard.")
        self._memory = gauge("tercet_shard_memory_bytes", "Memory of the open shards' indexes.")
        self._rows = gauge(
            "tercet_shard_segment_rows", "Rows of the open shards by the kind of segment.", ("host", "kind")
        )
        self._disk_free = gauge("tercet_shard_disk_free_bytes", "Free room on the disk that the shards are on.")
        self._disk = gauge("tercet_shard_disk_bytes", "Size of the disk that the shards are on.")
        self._maintenance = metrics.histogram(
            "tercet_shard_maintenance_seconds",
            "Time of each piece of maintenance.",
            ("host",),
            buckets=(0.01, 0.1, 1.0, 10.0, 60.0, 600.0),
        )
        self._failures: Counter = metrics.counter(
            "tercet_shard_call_failures_total", "Calls that a host of shards did not answer.", ("host",)
        )
        self._fallback: Counter = metrics.counter(
            "tercet_shard_fallback_answers_total", "Shards in whose place the fallback index answered."
        )

        self._lexical: Counter = metrics.counter(
            "tercet_shard_lexical_failures_total", "Answers of shards that could not search their words."
        )
        self._hedged: Counter = metrics.counter(
            "tercet_shard_hedged_reads_total",
            "Reads that a second replica was asked too, by which of the two answered first.",
            ("winner",),
            ("first", "second"),
        )

    def add(self, host: LocalHost) -> None:
        """Show how *host* stands from now on."""
        name = host.name
        self._lag.labels(name).set_function(lambda: host.lag)
        self._open.labels(name).set_function(lambda: len(host.open_standings()))
        self._catching_up.labels(name).set_function(
            lambda: sum(standing.catching_up for standing in host.open_standings())
        )
        self._age.labels(name).set_function(lambda: host.snapshot_age_s)
        self._memory.labels(name).set_function(lambda: sum(standing.memory_bytes for standing in host.open_standings()))
        self._maintenance.labels(name)
        self._disk_free.labels(name).set_function(lambda: host.disk_bytes()[0])
        self._disk.labels(name).set_function(lambda: host.disk_bytes()[1])
        for kind in SEGMENT_KINDS:
            self._rows.labels(name, kind).set_function(
                lambda kind=kind: sum(standing.segments.get(kind, 0) for standing in host.open_standings())  # type: ignore[misc]
            )

    def note_maintenance_seconds(self, host: str, seconds: float) -> None:
        """Count a piece of maintenance."""
        self._maintenance.labels(host).observe(seconds)

    def note_failure(self, host: str) -> None:
        """Count a call that a host did not answer."""
        self._failures.labels(host).inc()

    def note_fallback(self) -> None:
        """Count an answer of the fallback index."""
        self._fallback.inc()

    def note_lexical_failure(self) -> None:
        """Count an answer that is of the vectors alone as the words could not be searched."""
        self._lexical.inc()

    def note_hedge(self, second: bool) -> None:
        """Count a read that two replicas were asked, *second* saying that the later one was first to answer."""
        self._hedged.labels("second" if second else "first").inc()
