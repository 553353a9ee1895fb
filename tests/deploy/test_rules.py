"""Recording rules and alerts: each fires when it should and is silent otherwise, asks for what there is, and has a runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.observing import (
    OBSERVABILITY,
    RULES,
    Exported,
    all_rules,
    asked,
    bucket_bounds,
    parsed,
    queries,
    read_record,
    rules,
)

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "docs" / "runbooks"
ALERTS = [rule for rule in all_rules() if "alert" in rule]
RECORDINGS = [rule for rule in all_rules() if "record" in rule]
PARTS_OF_A_RUNBOOK = ["Symptom", "What it means", "First checks", "Remedies", "It is over when"]
COMPARISONS = {">", "<", ">=", "<="}
# The reference architecture's alerts: what each compares with, and for how long.
REFERENCE = {"HighEmbeddingLatency": ("> 0.5", "5m"), "LowRecall": ("< 0.8", "15m"), "HighErrorRate": ("> 0.01", "5m")}

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool: apt-get install prometheus"
)


def _tests() -> list[dict[str, Any]]:
    files = sorted((RULES / "tests").glob("*.yaml"))
    return [
        check
        for file in files
        for group in yaml.safe_load(file.read_text())["tests"]
        for check in group["alert_rule_test"]
    ]


@pytest.fixture(scope="module")
def exported() -> Exported:
    """What real services exported, and what rules make of it."""
    return Exported(read_record())


@promtool
def test_promtool_finds_no_fault_and_all_its_tests_hold():
    """`promtool check rules` and `promtool test rules`, on the very files that are deployed."""
    for command in (["check", "rules", *RULES.glob("*.yaml")], ["test", "rules", *(RULES / "tests").glob("*.yaml")]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_has_a_test_that_fires_and_one_that_is_silent(alert: dict[str, Any]):
    """An alert that was never seen to fire may be misspelt; one that was never silent may be of no use."""
    expected = [bool(check["exp_alerts"]) for check in _tests() if check["alertname"] == alert["alert"]]
    assert True in expected, "no test in which it fires"
    assert False in expected, "no test in which it is silent"


def test_tests_are_of_alerts_that_there_are():
    """A test of an alert that was renamed would be silent for ever."""
    assert {check["alertname"] for check in _tests()} == {alert["alert"] for alert in ALERTS}
    for file in (RULES / "tests").glob("*.yaml"):
        assert [Path(name).name for name in yaml.safe_load(file.read_text())["rule_files"]] == [file.name]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_says_how_urgent_it_is_and_leads_to_its_runbook(alert: dict[str, Any]):
    """Whoever is called gets a sentence, its meaning, and a page by the alert's own name."""
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{alert['alert']}.md"
    headings = re.findall(r"^## (.+)$", (RUNBOOKS / f"{alert['alert']}.md").read_text(), re.MULTILINE)
    assert headings == PARTS_OF_A_RUNBOOK


def test_every_runbook_belongs_to_an_alert():
    """A page for an alert that is gone would be read in vain."""
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == {alert["alert"] for alert in ALERTS}


def test_runbooks_name_metrics_that_there_are(exported: Exported):
    """What somebody types in the night has to exist."""
    for page in [*RUNBOOKS.glob("*.md"), ROOT / "docs" / "observability.md"]:
        named = set(
            re.findall(
                r"\b(?:tercet|embedding|search|gpu|process|retrieval|te|slo|job)(?:_\w+|:\w+:\w+)\b", page.read_text()
            )
        )
        metrics = {
            name
            for name in named
            if re.search(r"_(total|seconds|bytes|items|state|ratio|limit|bucket|sum|count)$|:", name)
        }
        assert {name for name in metrics if not exported.has(name)} == set(), page.name


def test_the_reference_alerts_are_there_under_their_names():
    """Their thresholds and durations are those of the reference architecture."""
    found = {alert["alert"]: alert for alert in ALERTS}
    for name, (threshold, lasting) in REFERENCE.items():
        assert threshold in found[name]["expr"]
        assert found[name]["for"] == lasting


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_ask_for_what_services_export(rule: dict[str, Any], exported: Exported):
    """Every metric, label, value and bucket bound in an expression is one that real services were seen to have."""
    assert exported.missing(rule["expr"]) == []


def test_what_is_not_exported_is_seen(exported: Exported):
    """The test before this one would notice a metric, label, value or bound that there is not."""
    known = 'rate(tercet_http_request_duration_seconds_bucket{job="search",le="0.5"}[5m])'
    assert exported.missing(f"sum by (route) ({known})") == []
    for wrong in (
        known.replace("_http_", "_htp_"),
        known.replace("job=", "shop="),
        known.replace("0.5", "0.6"),
        f"sum by (rute) ({known})",
    ):
        assert exported.missing(wrong) != [], wrong


def test_every_recording_is_used():
    """What nobody reads need not be computed every 15 seconds."""
    exprs = [rule["expr"] for rule in all_rules()] + [expr for _, _, expr in queries()]
    used = {selector.metric for expr in exprs for selector in asked(expr)}
    assert {rule["record"] for rule in RECORDINGS} - used == set()


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_bucket_bounds_include_the_thresholds(alert: dict[str, Any], exported: Exported):
    """A quantile between two bounds is a guess; at a bound it is exact, so an objective has to be one."""
    named = {selector.metric for selector in asked(alert["expr"])}
    exprs = [alert["expr"], *(rule["expr"] for rule in RECORDINGS if rule["record"] in named)]
    quantiles = [expr for expr in exprs if "histogram_quantile" in expr]
    metrics = {selector.metric for expr in quantiles for selector in asked(expr) if selector.metric.endswith("_bucket")}
    thresholds = _thresholds(alert["expr"]) if metrics else set()
    for metric in metrics:
        assert thresholds <= bucket_bounds(exported, metric), metric


def _thresholds(expr: str) -> set[float]:
    found: set[float] = set()

    def visit(node: promql_parser.Expr) -> None:
        if (
            isinstance(node, promql_parser.BinaryExpr)
            and str(node.op) in COMPARISONS
            and isinstance(node.rhs, promql_parser.NumberLiteral)
        ):
            found.add(node.rhs.val)

    promql_parser.walk(parsed(expr), pre_visit=visit)
    return found


def test_thresholds_are_seen():
    """The test before this one compares something."""
    assert _thresholds("a > 0.5 and b < 0.25 or c == 3") == {0.5, 0.25}


@promtool
def test_prometheus_takes_its_configuration():
    """The file that compose mounts is one that Prometheus starts with."""
    command = ["promtool", "check", "config", "--syntax-only", str(OBSERVABILITY / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_reach_somebody():
    """Alertmanager's example sends each severity somewhere, and holds back only alerts that there are."""
    config = yaml.safe_load((OBSERVABILITY / "alertmanager" / "alertmanager.yml").read_text())
    names = {alert["alert"] for alert in ALERTS}
    matched = [m for rule in config["inhibit_rules"] for m in (*rule["source_matchers"], *rule["target_matchers"])]
    for matcher in matched:
        label, values = re.fullmatch(r'(\w+)=~?"(.+)"', matcher).groups()  # type: ignore[union-attr]
        assert label == "job" or set(values.split("|")) <= names, matcher
    receivers = {receiver["name"] for receiver in config["receivers"]}
    assert {config["route"]["receiver"], *(route["receiver"] for route in config["route"]["routes"])} == receivers


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="there is no amtool: apt-get install prometheus-alertmanager"
)
def test_alertmanager_takes_its_example():
    """`amtool check-config` finds no fault."""
    command = ["amtool", "check-config", str(OBSERVABILITY / "alertmanager" / "alertmanager.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_in_files_that_say_what_they_are_about():
    """Every group's name begins with the product's, so that it is told apart in a Prometheus of many."""
    assert set(rules()) == {"slo", "services", "search", "capacity"}
    for file in RULES.glob("*.yaml"):
        assert file.read_text().startswith("# ")
        assert all(group["name"].startswith("tercet-") for group in yaml.safe_load(file.read_text())["groups"])
