"""Prometheus without an operator finds every pod of the manifests, at its port, under the job that rules and dashboards name."""

import re
from typing import Any

import yaml

from tests.deploy.manifests import Overlay, Workload
from tests.deploy.observing import JOBS, OBSERVABILITY

META = "__meta_kubernetes_pod_"
ADDRESS = "10.0.0.7"


def _found(workload: Workload) -> dict[str, str]:
    """Return what Kubernetes' discovery tells of a pod of *workload*."""
    known = {"label": workload.labels, "annotation": workload.annotations}
    told = {
        f"{META}{kind}_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": value
        for kind, of in known.items()
        for key, value in of.items()
    }
    first_port = next(iter(workload.ports.values()))
    return {**told, f"{META}ip": ADDRESS, f"{META}phase": "Running", "__address__": f"{ADDRESS}:{first_port}"}


def _relabelled(labels: dict[str, str], rules: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return *labels* as Prometheus has them after *rules*; None where they are dropped."""
    for rule in rules:
        value = ";".join(labels.get(name, "") for name in rule["source_labels"])
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        action = rule.get("action", "replace")
        if (action == "keep" and match is None) or (action == "drop" and match is not None):
            return None
        if action == "replace" and match is not None:
            labels = {
                **labels,
                rule["target_label"]: match.expand(re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1"))),
            }
    return labels


def test_pods_are_scraped_at_their_port_under_their_job(overlay: Overlay):
    """Each workload of ours is found once, shard nodes with their number; Redis and PostgreSQL are not."""
    config = yaml.safe_load((OBSERVABILITY / "prometheus-kubernetes.yml").read_text())
    rules = next(job for job in config["scrape_configs"] if job["job_name"] == "tercet-pods")["relabel_configs"]
    jobs = set()
    for workload in overlay.workloads:
        name = workload.labels["app.kubernetes.io/name"]
        target = _relabelled(_found(workload), rules)
        assert (target is not None) == (name in JOBS), name
        if target is not None:
            assert target["__address__"] == f"{ADDRESS}:{workload.ports['http']}"
            assert (target["job"], target["__metrics_path__"]) == (name, "/metrics")
            assert ("shard_node" in target) == (name == "shard")
            jobs.add(name)
    assert jobs == JOBS
