"""What the autoscalers of the manifests do over a load: they follow it, in time, and do not flap. The load is constructed."""

import itertools
import re
from collections.abc import Callable
from math import ceil

import pytest

from tests.deploy.autoscaling import (
    CAPACITY,
    READY_AFTER_S,
    Autoscaler,
    Sample,
    day,
    flaps,
    noise,
    recommend,
    reversals,
    simulate,
)
from tests.deploy.manifests import ROOT, Object, load

services = pytest.mark.parametrize("name", CAPACITY)


def _spec(name: str) -> Object:
    return dict(load("cpu").autoscaled()[name]["spec"])


def _run(name: str, load_at: Callable[[float], float], duration_s: float = 3600) -> list[Sample]:
    ready_after_s = READY_AFTER_S[name]
    return simulate(_spec(name), load_at, capacity=CAPACITY[name], ready_after_s=ready_after_s, duration_s=duration_s)


def _rules(**behavior: Object) -> Object:
    still: Object = {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 100, "periodSeconds": 15}]}
    cpu = {"containerResource": {"target": {"averageUtilization": 50}}}
    rules = {"scaleUp": still, "scaleDown": still, **behavior}
    return {"minReplicas": 1, "maxReplicas": 100, "metrics": [cpu], "behavior": rules}


@pytest.mark.parametrize(
    ("usages", "unready", "current", "expected"),
    [
        ([0.2], 0, 1, 2),  # The documentation's example: 200m where 100m are wanted.
        ([0.05, 0.05], 0, 2, 1),
        ([0.109], 0, 1, 1),
        ([0.091], 0, 1, 1),
        ([0.111], 0, 1, 2),
        ([0.2], 1, 2, 2),  # Half of the pods have not begun: with them it is as it should be.
        ([0.4], 1, 2, 4),
        ([0.05, 0.05], 2, 4, 1),
        ([], 1, 1, 1),
    ],
)
def test_the_ratio_decides(usages: list[float], unready: int, current: int, expected: int):
    """Replicas follow usage over target, a tenth either way changes nothing, and new pods count as idle."""
    assert recommend(usages, unready, 0.1, current) == expected


def test_the_longest_need_is_kept_through_the_window():
    """Fewer are wanted only when none of the last five minutes wanted more."""
    down = {"stabilizationWindowSeconds": 300, "policies": [{"type": "Pods", "value": 100, "periodSeconds": 15}]}
    scaler = Autoscaler(_rules(scaleDown=down))
    assert scaler.decide(0, [1.0], 0, 1) == 2
    assert [scaler.decide(at_s, [0.01] * 2, 0, 2) for at_s in range(15, 301, 15)] == [2] * 19 + [1]


def test_policies_limit_the_pace():
    """Of several policies the one that allows most holds, each counting the changes of its own period."""
    policies = [
        {"type": "Percent", "value": 100, "periodSeconds": 30},
        {"type": "Pods", "value": 2, "periodSeconds": 30},
    ]
    scaler = Autoscaler(_rules(scaleUp={"stabilizationWindowSeconds": 0, "policies": policies}))
    replicas, seen = 1, []
    for at_s in range(0, 91, 15):
        replicas = scaler.decide(at_s, [50.0] * replicas, 0, replicas)
        seen.append(replicas)
    assert seen == [3, 3, 6, 6, 12, 12, 24]


def test_the_capacities_are_measured_ones():
    """What one pod does is what benchmarks/RESULTS.md has in its tables for two cores."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    headings = {
        "embedding": "### 1 short text per request, 32 clients",
        "rerank": "### hybrid + rerank of 30, 1 client",
        "search": "### hybrid, no rerank, 16 clients",
    }
    for name, heading in headings.items():
        rows = re.findall(rf"{re.escape(heading)}.*?\n\| tercet \| ([\d,.]+) ", results, re.DOTALL)
        assert CAPACITY[name] in [float(row.replace(",", "")) for row in rows], name


@services
def test_a_day_is_followed_without_flapping(name: str):
    """Over a day with a noisy morning and afternoon the replicas rise and fall twice, and never turn back at once."""
    peak = CAPACITY[name] * 5
    samples = _run(name, lambda at_s: day(at_s, peak=peak), 86_400)
    assert reversals(samples) <= 3
    assert not flaps(samples)
    most = max(sample.replicas for sample in samples)
    assert ceil(5 / 0.77) <= most <= _spec(name)["maxReplicas"]
    assert samples[-1].replicas == _spec(name)["minReplicas"]
    assert sum(sample.utilisation >= 1 for sample in samples) == 0


@services
def test_a_steady_load_keeps_the_replicas(name: str):
    """Whatever the load, once the replicas have found their number a noise of 8 % does not move them."""
    for pods in (1.5, 2.3, 3.1, 4.4, 5.2):
        samples = _run(name, lambda at_s, mean=pods * CAPACITY[name]: mean * noise(at_s))
        settled = [sample.replicas for sample in samples if sample.at_s >= 900]
        assert len(set(settled)) == 1, (pods, sorted(set(settled)))


@services
def test_a_burst_is_met_within_two_minutes(name: str):
    """Twice the pods' capacity at once: enough pods answer before two minutes are over, and they go slowly, one a minute."""
    base, burst = CAPACITY[name] * 0.8, CAPACITY[name] * 4
    samples = _run(name, lambda at_s: burst if 600 <= at_s < 1200 else base)
    enough = next(sample.at_s for sample in samples if sample.at_s >= 600 and sample.ready * CAPACITY[name] >= burst)
    assert enough - 600 <= 120
    assert reversals(samples) == 1
    falls = [after.at_s for before, after in itertools.pairwise(samples) if after.replicas < before.replicas]
    assert falls[0] >= 1200 + 300
    assert all(second - first >= 60 for first, second in itertools.pairwise(falls))


@services
def test_more_than_the_most_stays_at_the_most(name: str):
    """A load beyond every pod keeps them all, and the number does not swing."""
    spec = _spec(name)
    samples = _run(name, lambda _at_s: CAPACITY[name] * (spec["maxReplicas"] + 5))
    assert {sample.replicas for sample in samples if sample.at_s >= 300} == {spec["maxReplicas"]}
