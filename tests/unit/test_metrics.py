"""Series that are about money, room and other services: what each counts, and that no label grows without bound."""

import math
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
from prometheus_client import CollectorRegistry

from services.common.app import create_service_app, make_breaker
from services.common.batching.metrics import BatchMetrics
from services.common.metrics import Metrics
from services.common.settings import ModelServiceSettings
from services.search.metrics import SearchMetrics
from services.search.settings import SearchSettings
from services.search.shards.directory import ShardDirectory
from services.search.shards.vectors import VectorOptions
from tests.integration.test_keys import bearer, make_router, write_keys


class _Nothing:
    def problems(self) -> Sequence[str]:
        return []


def _series(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


async def test_requests_and_tokens_are_counted_by_the_keys_name(tmp_path: Path):
    """Each configured key has its series from the start; strangers, of whom there may be any number, have none."""

    @asynccontextmanager
    async def build(_settings: ModelServiceSettings, _metrics: Metrics) -> AsyncIterator[_Nothing]:
        yield _Nothing()

    file = write_keys(tmp_path / "keys.json", shop={"scopes": ["embed"]}, quiet={"scopes": ["embed"]})
    settings = ModelServiceSettings(api_keys_file=file)
    app = create_service_app("embedding", settings, build, [make_router("")], description="")
    registry = app.state.service.metrics.registry
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://service") as client:
        for key in ("shop", "shop", "stranger"):
            await client.get("/work/40", headers=bearer(key))
        await client.get("/work/40")
    assert _series(registry, "tercet_key_requests_total") == {("shop",): 2, ("quiet",): 0}
    assert _series(registry, "tercet_key_tokens_total") == {("shop",): 80, ("quiet",): 0}


async def test_failures_of_a_dependency_are_counted_where_its_breaker_sees_them():
    """The count begins at 0 when the breaker is made, so that the first failure is already a rise."""
    metrics = Metrics("test")
    breaker = make_breaker("ledger", SearchSettings(), metrics)
    counted = [_series(metrics.registry, "tercet_dependency_failures_total")]
    for error in (OSError, None, OSError):
        try:
            async with breaker.guard():
                if error is not None:
                    raise error
        except OSError:
            pass
    counted.append(_series(metrics.registry, "tercet_dependency_failures_total"))
    assert counted == [{("ledger",): 0}, {("ledger",): 2}]


def test_search_has_the_names_that_the_reference_architecture_uses():
    """Searches by any of the three routes are in one histogram; recall is the mean of the latest samples."""
    metrics = Metrics("search")
    series = SearchMetrics(metrics)
    assert math.isnan(_series(metrics.registry, "retrieval_recall_at_10")[()])
    for recall in (1.0, 0.5):
        series.note_recall(recall)
    for route, seconds in (("/search", 0.2), ("/msearch", 0.4), ("/status", 9.0)):
        metrics.request_seconds.labels(route).observe(seconds)
    assert _series(metrics.registry, "retrieval_recall_at_10") == {(): 0.75}
    buckets = _series(metrics.registry, "search_latency_seconds_bucket")
    assert (buckets[("0.25",)], buckets[("0.5",)], buckets[("+Inf",)]) == (1, 2, 2)


def test_both_model_services_tell_how_much_memory_the_gpu_has():
    """Used and total are always there, both 0 without a GPU: a ratio of them is then no number, and no alert."""
    for work in ("embedding", "rerank"):
        metrics = Metrics(work)
        BatchMetrics(metrics, work)
        for name in ("gpu_memory_used_bytes", "gpu_memory_total_bytes"):
            assert list(_series(metrics.registry, name)) == [()]


def test_the_room_on_the_shards_disk_is_unknown_when_the_disk_is_gone(tmp_path: Path):
    """A file system that cannot be asked must not take the other series with it."""
    place = tmp_path / "shards"
    directory = ShardDirectory(place, VectorOptions(), readers=1, writers=1, maintenance_share=0.5)
    try:
        free, total = directory.disk_bytes()
        assert 0 < free < total
        shutil.rmtree(place)
        assert all(math.isnan(value) for value in directory.disk_bytes())
    finally:
        directory.close()
