"""
A real Prometheus that finds the simulation's pods by the relabelling that it has on Kubernetes, and judges by our rules.

Its discovery by the API server is a file of targets with the same `__meta_kubernetes_…` labels; the rest of
deploy/observability/prometheus-kubernetes.yml is taken as it is. It scrapes every second, and what a rule waits for (`for`)
is cut short, as in tests.deploy.observed.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.acts import Play
from tests.cluster.cluster import Cluster
from tests.cluster.pods import Pod
from tests.deploy.manifests import COMPONENT, NAME, ROOT
from tests.deploy.observed import Prometheus

CONFIGURATION = ROOT / "deploy" / "observability" / "prometheus-kubernetes.yml"
_OURS = "tercet-pods"
_SCRAPED = "prometheus.io/"
_WITHIN_S = 90.0
_WITHOUT_EMBEDDING = frozenset({"embedding_unavailable", "embedding_late"})
EXPECTED = frozenset({"ServiceDown", "InstanceDown", "BreakerOpen"})


class PodPrometheus(Prometheus):
    """A Prometheus whose targets are read from *place*/targets.json again and again."""

    @staticmethod
    def _config(place: Path, targets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        config = Prometheus._config(place, targets)
        (job,) = (
            job for job in yaml.safe_load(CONFIGURATION.read_text())["scrape_configs"] if job["job_name"] == _OURS
        )
        del job["kubernetes_sd_configs"]
        job["file_sd_configs"] = [{"files": [str(place / "targets.json")], "refresh_interval": "1s"}]
        return {**config, "scrape_configs": [job]}


def target(pod: Pod) -> dict[str, Any]:
    """Return a pod as discovery describes it, with the labels that the relabelling reads."""
    labels = {
        "__meta_kubernetes_pod_ip": pod.place.address,
        "__meta_kubernetes_pod_name": pod.name,
        "__meta_kubernetes_pod_node_name": pod.place.node,
        "__meta_kubernetes_pod_phase": "Running",
        **{f"__meta_kubernetes_pod_label_{_plain(label)}": pod.workload.labels[label] for label in (NAME, COMPONENT)},
        **{
            f"__meta_kubernetes_pod_annotation_{_plain(key)}": value
            for key, value in pod.workload.annotations.items()
            if key.startswith(_SCRAPED)
        },
    }
    return {"targets": [pod.place.address], "labels": labels}


def _plain(key: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in key)


async def watch(cluster: Cluster, play: Play, place: Path, doing: Callable[[], Awaitable[None]]) -> list[str]:
    """Have Prometheus look on while *doing*, and then while embedding crashes and comes back; return complaints."""
    directory = place / "prometheus"
    directory.mkdir()
    telling = asyncio.create_task(_tell_targets(cluster, directory / "targets.json"))
    with ExitStack() as stack:
        try:
            prometheus = await asyncio.to_thread(stack.enter_context, PodPrometheus(directory, {}))
            await doing()
            fired = await asyncio.to_thread(
                prometheus.query, 'count by (alertname, job) (count_over_time(ALERTS{alertstate="firing"}[1h]))'
            )
            names = sorted({f"{labels['alertname']} {labels.get('job', '')}".strip() for labels, _ in fired})
            play.timeline.tell(f"fired so far, with `for` cut short: {', '.join(names) or 'nothing'}")
            await _crash_embedding(cluster, play, prometheus)
            errors = prometheus.rule_errors()
        except AssertionError as error:
            return [f"alerts: {error}"]
        finally:
            telling.cancel()
    return [f"a rule failed: {error}" for error in errors]


async def _tell_targets(cluster: Cluster, file: Path) -> None:
    while True:
        targets = [target(pod) for pod in cluster.pods if f"{_SCRAPED}scrape" in pod.workload.annotations]
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(targets))
        fresh.replace(file)
        await asyncio.sleep(1)


async def _crash_embedding(cluster: Cluster, play: Play, prometheus: Prometheus) -> None:
    """Kill all pods of embedding, and let them start again once the alerts fire. An assertion fails where they do not."""

    def firing() -> set[str]:
        return {
            labels["alertname"]
            for labels in prometheus.firing()
            if "embedding" in (labels.get("job"), labels.get("dependency"))
        }

    async with play.act("all pods of embedding are killed, and stay down", _WITHOUT_EMBEDDING):
        for pod in cluster.of("embedding"):
            pod.allowed.clear()
            pod.kill()
        took_s = await asyncio.to_thread(prometheus.until, lambda: firing() >= EXPECTED, within_s=_WITHIN_S)
        play.timeline.tell(f"after {took_s:.0f} s these fire:")
        for name in sorted(EXPECTED):
            play.timeline.tell(f"   {name}: {await asyncio.to_thread(prometheus.summary, name)}")
        for pod in cluster.of("embedding"):
            pod.allowed.set()
        took_s = await asyncio.to_thread(prometheus.until, lambda: not firing() & EXPECTED, within_s=_WITHIN_S)
        play.timeline.tell(f"embedding is back; {took_s:.0f} s later none of them fires")
