"""What Prometheus is told about the pods is true: where it scrapes, and what the autoscalers ask it for."""

import re
from pathlib import Path

import httpx2
import promql_parser
import pytest

from services.embedding.app import create_app as create_embedding
from services.embedding.settings import EmbeddingSettings
from services.rerank.app import create_app as create_rerank
from services.rerank.settings import RerankSettings
from services.search.app import create_app as create_search
from services.search.settings import SearchSettings
from tests.deploy.manifests import COMPONENT, NAME, Object, load, selects

SERVICES = {"embedding", "rerank", "search", "shard", "fallback"}


def _queries() -> list[str]:
    found = [trigger for item in load("ci").of("ScaledObject") for trigger in item["spec"]["triggers"]]
    return [trigger["metadata"]["query"] for trigger in found if trigger["type"] == "prometheus"]


def _monitor() -> Object:
    (monitor,) = load("ci").of("PodMonitor")
    return dict(monitor["spec"])


async def _exposition(job: str, directory: Path) -> str:
    """Return what a service of this kind, running, shows as metrics."""
    app = {
        "embedding": lambda: create_embedding(EmbeddingSettings(model="fake")),
        "rerank": lambda: create_rerank(RerankSettings(model="fake")),
        "search": lambda: create_search(SearchSettings(data_dir=directory)),
    }[job]()
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://pod") as client,
    ):
        return (await client.get("/metrics")).text


@pytest.mark.parametrize("job", ["embedding", "rerank", "search"])
async def test_autoscalers_ask_for_metrics_that_exist(job: str, tmp_path: Path):
    """Each series of a KEDA query is one that the running service of its job has from the start."""
    selectors = [found for query in _queries() for found in re.findall(r'(\w+)\{job="(\w+)"', query)]
    names = {metric for metric, of_job in selectors if of_job == job}
    assert names
    shown = await _exposition(job, tmp_path)
    for name in names:
        assert re.search(rf"^{name} ", shown, re.MULTILINE), name


def test_autoscalers_ask_for_jobs_that_are_scraped():
    """Queries name jobs that the PodMonitor makes, and the pool's own pods by the label `pod`."""
    for query in _queries():
        promql_parser.parse(query)
        jobs = set(re.findall(r'job="(\w+)"', query))
        assert len(jobs) == 1
        assert jobs <= SERVICES
        for pool in re.findall(r'pod!~"(.+?)-\.\*"', query):
            assert load("ci").workload(pool)


def test_all_services_are_scraped_and_nothing_else():
    """The PodMonitor takes our pods by a port that they have, and their names become the jobs."""
    spec = _monitor()
    (endpoint,) = spec["podMetricsEndpoints"]
    taken = [workload for workload in load("ci").workloads if selects(spec["selector"], workload.labels)]
    assert {workload.labels[spec["jobLabel"]] for workload in taken} == SERVICES
    assert taken == load("ci").ours
    for workload in taken:
        assert endpoint["port"] in workload.ports
        assert workload.annotations["prometheus.io/path"] == endpoint["path"]


def test_shard_nodes_are_told_apart():
    """The label `shard_node` is the node's number, and other pods have none."""
    (endpoint,) = _monitor()["podMetricsEndpoints"]
    (rule,) = [item for item in endpoint["relabelings"] if item["targetLabel"] == "shard_node"]
    meta = "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", COMPONENT)
    assert rule["sourceLabels"] == [meta]
    for workload in load("ci").ours:
        found = re.fullmatch(rule["regex"], workload.labels[COMPONENT])
        assert (found is not None) is (workload.labels[NAME] == "shard")
        if found:
            assert found.expand(rule["replacement"].replace("$", "\\")) == workload.name.removeprefix("shard-")
