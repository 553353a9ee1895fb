"""
What dashboards and rules ask, what services export, and how the two are compared.

A recorded run (`recorded.prom.gz`, written by `make dashboards-check RECORD=1`) holds what each process of an ObservedStack
exported at two moments, so that the comparison takes a second. Another test holds the record against today's code.
"""

import gzip
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.observability.grafana.dashboards import ALL
from deploy.observability.grafana.panels import Dashboard, Panel

OBSERVABILITY = Path(__file__).parents[2] / "deploy" / "observability"
RULES = OBSERVABILITY / "rules"
RECORD = Path(__file__).parent / "recorded.prom.gz"
INTERVAL = "$__rate_interval"

# Queries that have no data in a run on a machine without a GPU, by the panel's title, and why that is right.
WITHOUT_A_GPU: Mapping[str, str] = {
    "GPU": "no process has a GPU, so none has GPU seconds",
    "GPU memory": "0 of 0 bytes in use is no number",
    "GPU seconds by key": "no process has a GPU, so there is nothing to share out",
}

# Names in rules that other programs export: whose, and which labels they bring.
FOREIGN: Mapping[str, tuple[str, frozenset[str]]] = {
    "kubelet_volume_stats_available_bytes": ("kubelet", frozenset({"namespace", "persistentvolumeclaim"})),
    "kubelet_volume_stats_capacity_bytes": ("kubelet", frozenset({"namespace", "persistentvolumeclaim"})),
    "certmanager_certificate_expiration_timestamp_seconds": ("cert-manager", frozenset({"name", "namespace"})),
    "probe_ssl_earliest_cert_expiry": ("blackbox exporter", frozenset()),
}
# What Prometheus itself adds.
OF_PROMETHEUS: Mapping[str, frozenset[str]] = {
    "up": frozenset(),
    "ALERTS": frozenset({"alertname", "alertstate"}),
}
ON_EVERY_SERIES = frozenset({"job", "instance"})
JOBS = frozenset({"embedding", "rerank", "search", "shard", "fallback"})


@dataclass(frozen=True, slots=True)
class Asked:
    """One selector in a query: its metric, and the labels it matches with operator and value."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def rules() -> dict[str, list[dict[str, Any]]]:
    """Return all rules by the name of their file."""
    return {
        file.stem: [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
        for file in sorted(RULES.glob("*.yaml"))
    }


def all_rules() -> list[dict[str, Any]]:
    """Return all rules."""
    return [rule for found in rules().values() for rule in found]


def queries() -> Iterator[tuple[Dashboard, Panel, str]]:
    """Yield every query of every dashboard, with its page and panel."""
    for dashboard in ALL:
        for panel in dashboard.panels():
            for query in panel.queries:
                yield dashboard, panel, query.expr


def parsed(expr: str) -> promql_parser.Expr:
    """Return the syntax tree of *expr*, Grafana's interval being a minute."""
    return promql_parser.parse(expr.replace(INTERVAL, "1m"))


def asked(expr: str) -> list[Asked]:
    """Return all selectors in *expr*."""
    found: list[Asked] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector):
            matchers = tuple((matcher.name, str(matcher.op), matcher.value) for matcher in node.matchers.matchers)
            found.append(Asked(node.name, matchers))

    promql_parser.walk(parsed(expr), pre_visit=visit)
    return list(dict.fromkeys(found))


def grouped_labels(expr: str) -> set[str]:
    """Return the labels by which *expr* groups, and on which it matches."""
    labels: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            labels.update(modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and modifier is not None and modifier.matching is not None:
            labels.update(modifier.matching.labels)

    promql_parser.walk(parsed(expr), pre_visit=visit)
    return labels


Series = Mapping[tuple[str, tuple[tuple[str, str], ...]], Sequence[float]]


def write_record(first: Mapping[tuple[str, str], str], second: Mapping[tuple[str, str], str]) -> None:
    """Keep two scrapes of each process, by job and instance, without help texts and times of creation."""
    parts = []
    for (job, instance), text in first.items():
        for moment, found in enumerate((text, second[job, instance])):
            lines = [line for line in found.splitlines() if not line.startswith("# HELP") and "_created" not in line]
            parts.append("\n".join([f"## {job} {instance} {moment}", *lines]))
    RECORD.write_bytes(gzip.compress("\n".join(parts).encode(), mtime=0))


def read_record() -> Series:
    """Return the recorded series: their two values, by name and sorted labels with job and instance; NaN where there was none."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
    for part in gzip.decompress(RECORD.read_bytes()).decode().split("## ")[1:]:
        head, _, text = part.partition("\n")
        job, instance, moment = head.split()
        for sample in samples(text):
            labels = tuple(sorted({**sample.labels, "job": job, "instance": instance}.items()))
            found.setdefault((sample.name, labels), [math.nan, math.nan])[int(moment)] = sample.value
    return found


def samples(text: str) -> Iterable[Any]:
    """Return the samples in *text*, which is in Prometheus's format."""
    return (sample for family in text_string_to_metric_families(text) for sample in family.samples)


class Exported:
    """The metrics in a record with their labels and values, and what the rules make of them."""

    def __init__(self, series: Series) -> None:
        self._values: dict[str, dict[str, set[str]]] = {}
        for name, labels in series:
            values = self._values.setdefault(name, {})
            for label, value in labels:
                values.setdefault(label, set()).add(value)
        self._recordings: dict[str, list[str]] = {}
        for rule in all_rules():
            if "record" in rule:
                self._recordings.setdefault(rule["record"], []).append(rule["expr"])

    def has(self, metric: str) -> bool:
        """Whether *metric* is a name that services, rules or one of the other known sources have; a histogram's own name too."""
        known = (self._values, self._recordings, FOREIGN, OF_PROMETHEUS)
        return any(metric in names for names in known) or f"{metric}_bucket" in self._values

    def labels_of(self, metric: str) -> set[str]:
        """Return the labels that series of *metric* may have."""
        if metric in self._recordings:
            selectors = [selector for expr in self._recordings[metric] for selector in asked(expr)]
            return ON_EVERY_SERIES.union(*(self.labels_of(selector.metric) for selector in selectors))
        if metric in FOREIGN:
            return ON_EVERY_SERIES | FOREIGN[metric][1]
        return ON_EVERY_SERIES | OF_PROMETHEUS.get(metric, frozenset()) | set(self._values.get(metric, ()))

    def values(self, metric: str, label: str) -> set[str]:
        """Return the values that *label* was seen to have on *metric*."""
        return self._values.get(metric, {}).get(label, set())

    def missing(self, expr: str) -> list[str]:
        """Return what *expr* asks for and nobody exports: a metric, a label, or a value that it must have."""
        selectors = asked(expr)
        found = [f"no metric {selector.metric}" for selector in selectors if not self.has(selector.metric)]
        for selector in selectors:
            for label, op, value in selector.matchers:
                if label not in self.labels_of(selector.metric):
                    found.append(f"{selector.metric} has no label {label}")
                elif not self._may_be(selector.metric, label, op, value):
                    found.append(f"{selector.metric} has no {label} {value}")
        known = set().union(*(self.labels_of(selector.metric) for selector in selectors)) | {"le"}
        return found + [f"there is no label {label} to group by" for label in grouped_labels(expr) - known]

    def _may_be(self, metric: str, label: str, op: str, value: str) -> bool:
        """Whether a matcher that asks for a value asks for one that was seen. Failures are not in a record that went well."""
        if metric not in self._values or label == "status" or op not in ("MatchOp.Equal", "MatchOp.Re"):
            return True
        seen = JOBS if label == "job" else self.values(metric, label)
        wanted = value.split("|") if op == "MatchOp.Re" else [re.escape(value)]
        return all(any(re.fullmatch(pattern, known) for known in seen) for pattern in wanted)


def bucket_bounds(exported: Exported, metric: str) -> set[float]:
    """Return the upper bounds of the buckets of *metric*."""
    return {float(bound) for bound in exported.values(metric, "le")}
