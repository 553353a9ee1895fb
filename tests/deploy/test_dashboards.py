"""Dashboards: the files are what the modules say, every query asks for what there is, and has data in a recorded run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from deploy.observability.grafana.dashboards import ALL, PLACE, written
from deploy.observability.grafana.panels import GRID_COLUMNS, Dashboard
from services.embedding.app import create_app as create_embedding
from services.embedding.settings import EmbeddingSettings
from services.rerank.app import create_app as create_rerank
from services.rerank.settings import RerankSettings
from services.search.app import create_app as create_search
from services.search.settings import SearchSettings
from tests.deploy.observing import (
    INTERVAL,
    OBSERVABILITY,
    ON_EVERY_SERIES,
    RULES,
    WITHOUT_A_GPU,
    Exported,
    Series,
    grouped_labels,
    queries,
    read_record,
)
from tests.integration.conftest import serving

PROVISIONING = OBSERVABILITY / "grafana" / "provisioning"
RECORDED_INTERVAL = "5m"  # Two scrapes a minute apart are both in it.


@pytest.mark.parametrize("dashboard", ALL, ids=lambda dashboard: dashboard.uid)
def test_files_are_what_the_modules_say(dashboard: Dashboard):
    """`python -m deploy.observability.grafana.dashboards` was run after the last change."""
    assert (PLACE / f"{dashboard.uid}.json").read_text() == written(dashboard)


def test_there_is_no_other_file_and_no_panel_over_another():
    """Grafana loads all files of the directory, and draws panels where they say."""
    assert {file.stem for file in PLACE.glob("*")} == {dashboard.uid for dashboard in ALL}
    for dashboard in ALL:
        taken: set[tuple[int, int]] = set()
        panels = json.loads(written(dashboard))["panels"]
        assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
        for place in (panel["gridPos"] for panel in panels):
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            assert place["x"] + place["w"] <= GRID_COLUMNS
            taken |= cells


def test_queries_ask_for_what_services_export():
    """Every metric, label, value and bucket bound in a query is one that real services were seen to have."""
    exported = Exported(read_record())
    assert [(panel.title, problem) for _, panel, expr in queries() for problem in exported.missing(expr)] == []


def test_legends_name_labels_that_the_series_have():
    """A legend of another label would be empty."""
    exported = Exported(read_record())
    for dashboard in ALL:
        for panel in dashboard.panels():
            for query in panel.queries:
                named = set(re.findall(r"{{(\w+)}}", query.legend))
                if re.fullmatch(r"[\w:]+", query.expr):
                    assert named <= exported.labels_of(query.expr), (panel.title, query.legend)
                else:
                    assert named <= grouped_labels(query.expr) | {"job", "instance"}, (panel.title, query.legend)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool: apt-get install prometheus")
def test_every_query_has_data_in_the_recorded_run(tmp_path: Path):
    """promtool answers each from the two scrapes of real services, and finds a number; none where there is no GPU, rightly."""
    series = [
        {
            "series": f"{name}{{{','.join(f'{label}={json.dumps(value)}' for label, value in labels)}}}",
            "values": _values(found),
        }
        for (name, labels), found in read_record().items()
    ]
    up = {(dict(labels)["job"], dict(labels)["instance"]) for _, labels in read_record()}
    series += [{"series": f'up{{job="{job}",instance="{instance}"}}', "values": "1 1"} for job, instance in up]
    checks = [
        {
            "expr": f"count((({expr.replace(INTERVAL, RECORDED_INTERVAL)}) * 0) == 0) > bool 0",
            "eval_time": "1m",
            "exp_samples": [] if panel.title in WITHOUT_A_GPU else [{"labels": "{}", "value": 1}],
        }
        for _, panel, expr in queries()
    ]
    test = {
        "rule_files": [str(file) for file in RULES.glob("*.yaml")],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": checks}],
    }
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps(test))  # JSON is YAML, and written much faster.
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def _values(found: list[float]) -> str:
    return " ".join("_" if value != value else repr(value) for value in found)  # NaN is what it is not.


def test_panels_without_data_are_panels_that_there_are():
    """The list of exceptions has reasons, and nothing that is gone."""
    assert set(WITHOUT_A_GPU) <= {panel.title for _, panel, _ in queries()}
    assert all(WITHOUT_A_GPU.values())


APPS = {
    "embedding": lambda _: create_embedding(EmbeddingSettings(model="fake")),
    "rerank": lambda _: create_rerank(RerankSettings(model="fake")),
    "search": lambda place: create_search(SearchSettings(data_dir=place, fallback="local")),
}


@pytest.mark.parametrize("job", APPS)
async def test_the_record_is_of_what_services_export_today(job: str, tmp_path: Path):
    """Metrics, their types and their labels are those of the code as it is; else `make dashboards-check RECORD=1` is due."""
    app: FastAPI = APPS[job](tmp_path)
    async with serving(app) as client:
        assert (await client.get("/livez")).status_code == 200
        text = (await client.get("/metrics")).text
    recorded = _metrics_of(read_record(), {job, "shard", "fallback"} if job == "search" else {job})
    today: dict[str, set[str]] = {}
    families = {family.name for family in text_string_to_metric_families(text) if not family.name.endswith("_created")}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                today.setdefault(sample.name, set()).update(sample.labels)
    for name, labels in today.items():
        assert recorded.get(name, labels) == labels, name
    # Series that have no value before something happens are families without samples today, and may be in the record.
    assert set(today) - set(recorded) == set()
    assert {name for name in recorded if not any(name.startswith(family) for family in families)} == set()


def _metrics_of(record: Series, jobs: set[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, labels in record:
        if dict(labels)["job"] in jobs:
            found.setdefault(name, set()).update(label for label, _ in labels if label not in ON_EVERY_SERIES)
    return found


def test_grafana_finds_the_dashboards_and_prometheus():
    """Panels choose their source by the variable; the provisioned one is the default."""
    (source, _logs) = yaml.safe_load((PROVISIONING / "datasources" / "tercet.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "tercet.yaml").read_text())["providers"]
    assert provider["options"]["path"]


def test_prometheus_asks_the_ports_that_services_listen_on():
    """Ports and the names of jobs are those of the services."""
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    ports = {
        job["job_name"]: job["dns_sd_configs"][0]["port"] for job in config["scrape_configs"] if "dns_sd_configs" in job
    }
    node = SearchSettings(role="fallback", ledger_url="postgresql://db/tercet").listen_port
    models = {"embedding": EmbeddingSettings().listen_port, "rerank": RerankSettings().listen_port}
    assert ports == {**models, "search": SearchSettings().listen_port, "shard": node, "fallback": node}


def test_the_log_pipeline_reads_fields_that_log_lines_have():
    """A line as a service writes it has the fields that become labels, and a time in the stated format."""
    program = (
        "import structlog, services.common.logs as logs; logs.configure_logs('search', level='info', log_format='json');"
        "structlog.contextvars.bind_contextvars(request_id='r1'); structlog.get_logger('x').warning('request', code='overloaded')"
    )
    line = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stderr)
    pipeline = (OBSERVABILITY / "alloy" / "pipeline.alloy").read_text()
    read = dict(re.findall(r'^ +(\w+) += "(\w+)",$', pipeline[: pipeline.index("stage.timestamp")], re.MULTILINE))
    assert set(read.values()) - set(line) == {"trace_id"}  # There only where a request is traced.
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])
    used = set(re.findall(r'^ +(\w+) += "",$', pipeline, re.MULTILINE))
    assert used == set(read) - {"time"}
