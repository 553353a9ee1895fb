"""
Kubernetes' autoscaler (autoscaling/v2) computed, and a cluster of pods that it scales, to see what a load does to replicas.

The algorithm is that of https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/ as the
controller has it (pkg/controller/podautoscaler: replica_calculator.go, horizontal.go): a tolerance of 0.1, pods that are not
ready set aside, stabilisation windows, and policies. `python -m tests.deploy.autoscaling` prints a day of each service.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.deploy.manifests import Object, load

TOLERANCE = 0.1
SYNC_S = 15
"""The controller's default period; metrics-server measures as often."""


def recommend(usages: Sequence[float], unready: int, target: float, current: int) -> int:
    """
    Return the replicas that one metric asks for.

    *usages* are the ready pods' shares of what they request, *target* the share aimed at; *unready* pods count as idle when
    more are wanted, and not at all when fewer are.
    """
    if not usages:
        return current
    ratio = sum(usages) / len(usages) / target
    if unready == 0 or ratio <= 1:
        within = abs(ratio - 1) <= TOLERANCE
        return current if within else math.ceil(ratio * len(usages))
    pods = len(usages) + unready
    lower = sum(usages) / pods / target
    if abs(lower - 1) <= TOLERANCE or lower < 1:
        return current
    return max(current, math.ceil(lower * pods))


@dataclass
class Autoscaler:
    """The controller's memory of one HorizontalPodAutoscaler, whose *spec* it follows."""

    spec: Object
    recommended: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    @property
    def target(self) -> float:
        """The share of the requested CPU that is aimed at."""
        (metric,) = self.spec["metrics"]
        return float(metric["containerResource"]["target"]["averageUtilization"]) / 100

    def decide(self, now_s: float, usages: Sequence[float], unready: int, current: int) -> int:
        """Return the replicas from now on, and remember the change."""
        wanted = self._stabilised(now_s, recommend(usages, unready, self.target, current), current)
        if wanted > current:
            wanted = min(wanted, max(current, self._limit(now_s, current, "scaleUp")))
        elif wanted < current:
            wanted = max(wanted, min(current, self._limit(now_s, current, "scaleDown")))
        wanted = min(max(wanted, self.spec["minReplicas"]), self.spec["maxReplicas"])
        if wanted != current:
            self.changes.append((now_s, wanted - current))
        return wanted

    def _stabilised(self, now_s: float, wanted: int, current: int) -> int:
        """Return the least that was wanted in the window for more, or the most in the window for fewer."""
        up_s, down_s = (self.spec["behavior"][way]["stabilizationWindowSeconds"] for way in ("scaleUp", "scaleDown"))
        kept = [(at_s, replicas) for at_s, replicas in self.recommended if at_s > now_s - max(up_s, down_s)]
        self.recommended = [*kept, (now_s, wanted)]
        least = min(replicas for at_s, replicas in self.recommended if at_s > now_s - up_s or at_s == now_s)
        most = max(replicas for at_s, replicas in self.recommended if at_s > now_s - down_s or at_s == now_s)
        return min(max(current, least), most)

    def _limit(self, now_s: float, current: int, way: str) -> int:
        rules = self.spec["behavior"][way]
        select = rules.get("selectPolicy", "Max")
        if select == "Disabled":
            return current
        limits = []
        for policy in rules["policies"]:
            recent = [change for at_s, change in self.changes if at_s > now_s - policy["periodSeconds"]]
            start, value = current - sum(recent), policy["value"]
            if way == "scaleUp":
                limits.append(start + value if policy["type"] == "Pods" else math.ceil(start * (1 + value / 100)))
            else:
                limits.append(start - value if policy["type"] == "Pods" else int(start * (1 - value / 100)))
        boldest, mildest = (max, min) if way == "scaleUp" else (min, max)
        return boldest(limits) if select == "Max" else mildest(limits)


@dataclass(frozen=True)
class Sample:
    """How things stood at one moment: requests a second that came, pods, pods that answered, and how busy these were."""

    at_s: float
    load: float
    replicas: int
    ready: int
    utilisation: float


def simulate(
    spec: Object, load_at: Callable[[float], float], *, capacity: float, ready_after_s: float, duration_s: float
) -> list[Sample]:
    """
    Return a sample for each turn of the controller over *duration_s* of a load.

    A pod answers *capacity* requests a second with all the CPU that it requests, which is all it may take, and begins
    *ready_after_s* after it was wanted. The load is shared evenly; the controller sees the usage of the turn before.
    """
    scaler = Autoscaler(spec)
    starts = [-ready_after_s] * int(spec["minReplicas"])
    samples: list[Sample] = []
    seen: list[float] = []
    for turn in range(int(duration_s / SYNC_S)):
        now_s = float(turn * SYNC_S)
        ready = sum(1 for start_s in starts if now_s - start_s >= ready_after_s)
        usage = min(1.0, load_at(now_s) / (capacity * ready)) if ready else 0.0
        samples.append(Sample(now_s, load_at(now_s), len(starts), ready, usage))
        wanted = (
            scaler.decide(now_s, seen[:ready], len(starts) - min(ready, len(seen)), len(starts))
            if seen
            else len(starts)
        )
        seen = [usage] * ready
        starts = starts[:wanted] + [now_s] * (wanted - len(starts))
    return samples


def reversals(samples: Sequence[Sample]) -> int:
    """Return how often the number of replicas turned from growing to shrinking or back."""
    steps = [after.replicas - before.replicas for before, after in itertools.pairwise(samples)]
    directions = [step > 0 for step in steps if step]
    return sum(first != second for first, second in itertools.pairwise(directions))


def flaps(samples: Sequence[Sample], within_s: float = 600) -> list[float]:
    """Return when the number of replicas fell and rose again *within_s*, or rose and fell while the load did not."""
    found, changes = [], []
    for before, after in itertools.pairwise(samples):
        if after.replicas != before.replicas:
            changes.append((after.at_s, after.replicas - before.replicas, after.load))
    for (first_s, first, first_load), (second_s, second, second_load) in itertools.pairwise(changes):
        steady = abs(second_load - first_load) <= 0.2 * first_load
        if first * second < 0 and second_s - first_s <= within_s and steady:
            found.append(second_s)
    return found


def noise(at_s: float) -> float:
    """Return a factor within 8 % of 1 that is the same each time."""
    return 1 + 0.05 * math.sin(at_s * 0.7) + 0.03 * math.sin(at_s * 2.3 + 1)


def day(at_s: float, *, peak: float) -> float:
    """Return the load of a constructed day: a night, a morning and an afternoon of up to *peak*, and noise."""
    hour = at_s / 3600 % 24
    hump = math.exp(-(((hour - 10.5) / 2.2) ** 2)) + 0.85 * math.exp(-(((hour - 15.5) / 2.0) ** 2))
    return peak * (0.05 + 0.95 * min(hump, 1.0)) * noise(at_s)


CAPACITY = {"embedding": 1527.0, "rerank": 9.15, "search": 218.0}
"""Requests a second of one pod, from benchmarks/RESULTS.md; a test finds them there. They are of two cores: short texts; searches
with a rerank of 30, nearly all of whose time is the rerank; hybrid searches, of which the router is a part only."""

READY_AFTER_S = {"embedding": 40.0, "rerank": 40.0, "search": 10.0}


def main() -> None:
    """Print replicas over a day, by half hours."""
    for name, capacity in CAPACITY.items():
        spec = load("cpu").autoscaled()[name]["spec"]
        samples = simulate(
            spec,
            lambda at_s, peak=capacity * 5.0: day(at_s, peak=peak),  # type: ignore[misc]
            capacity=capacity,
            ready_after_s=READY_AFTER_S[name],
            duration_s=86_400,
        )
        print(
            f"\n{name}: {capacity:g} requests/s of a pod; reversals {reversals(samples)}, flaps {len(flaps(samples))}"
        )
        for sample in samples[:: 1800 // SYNC_S]:
            clock = f"{int(sample.at_s // 3600):02}:{int(sample.at_s % 3600 // 60):02}"
            print(f"{clock} {sample.load:8.1f}/s {sample.utilisation:4.0%} {sample.replicas:2} {'#' * sample.replicas}")


if __name__ == "__main__":
    main()
