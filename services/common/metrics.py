"""
Prometheus metrics: a registry per application, so that tests build many apps in one process.

Every series that can be known in advance exists from the start with value 0: an empty `/metrics` breaks alerts.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from weakref import WeakValueDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from services.common.breaker import Breaker
from services.common.errors import TercetError

# Bounds include the usual objectives (10, 50, 100, 250, 500 ms, 1 s), so that "share under the objective" is exact.
LATENCY_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.035,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)


class Metrics:
    """The metrics that every service has; a service adds its own to `registry`."""

    def __init__(self, service: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "tercet_http_requests_total",
            "Requests by route, method and status.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "tercet_http_request_duration_seconds",
            "Time to answer, by route.",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("tercet_http_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.errors = self.counter("tercet_errors_total", "Errors answered, by code.", ("code",), _codes(TercetError))
        Gauge("tercet_service_info", "Always 1; names the service.", ["service"], registry=self.registry).labels(
            service
        ).set(1)
        self.breaker_state = Gauge(
            "tercet_breaker_state", "0 closed, 1 half-open, 2 open.", ["dependency"], registry=self.registry
        )
        self.breakers: WeakValueDictionary[str, Breaker] = WeakValueDictionary()
        """Those whose state is shown, by dependency, as long as they are in use."""
        self.dependency_failures = Counter(
            "tercet_dependency_failures_total",
            "Calls that failed or were slow, as the breaker before the dependency counts them.",
            ["dependency"],
            registry=self.registry,
        )
        self.key_requests = self.counter("tercet_key_requests_total", "Requests by the API key's name.", ("key",))
        self.key_tokens = self.counter(
            "tercet_key_tokens_total", "Tokens that a model read for requests, by the API key's name.", ("key",)
        )
        self.extra_calls = Counter(
            "tercet_extra_calls_total",
            "Retries and hedged reads that the budget allowed (made) or not (refused).",
            ["dependency", "outcome"],
            registry=self.registry,
        )

    def show_keys(self, names: Iterable[str]) -> None:
        """Let the series of the API keys called *names* start at 0; there are none for other callers."""
        for name in names:
            self.key_requests.labels(name)
            self.key_tokens.labels(name)

    def counter(self, name: str, text: str, labels: tuple[str, ...] = (), values: tuple[str, ...] = ()) -> Counter:
        """Add a counter; with one label, its series for each of *values* starts at 0."""
        counter = Counter(name, text, labels, registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> Gauge:
        """Add a gauge whose value is read when it is scraped."""
        gauge = Gauge(name, text, registry=self.registry)
        gauge.set_function(read)
        return gauge

    def histogram(
        self, name: str, text: str, labels: tuple[str, ...] = (), *, buckets: tuple[float, ...] = LATENCY_BUCKETS_S
    ) -> Histogram:
        """Add a histogram."""
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def exposition(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


def summed(
    histograms: Iterable[Histogram], routes: Collection[str] | None = None
) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets of *histograms*, summed (of these *routes* only, where they have routes), and their sum."""
    buckets: dict[str, float] = defaultdict(float, {"+Inf": 0.0})
    total = 0.0
    for family in (family for histogram in histograms for family in histogram.collect()):
        for sample in family.samples:
            if routes is not None and sample.labels["route"] not in routes:
                continue
            if sample.name.endswith("_bucket"):
                buckets[sample.labels["le"]] += sample.value
            elif sample.name.endswith("_sum"):
                total += sample.value
    return sorted(buckets.items(), key=lambda bucket: float(bucket[0])), total


def _codes(cls: type[TercetError]) -> tuple[str, ...]:
    return (cls.code, *(code for sub in cls.__subclasses__() for code in _codes(sub)))
