"""The rendered manifests as the checks read them: objects by kind and name, workloads, and the environment of their processes."""

import base64
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.settings import ServiceSettings, read_settings
from services.embedding.settings import EmbeddingSettings
from services.rerank.settings import RerankSettings
from services.search.settings import SearchSettings

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
RENDERED = K8S / "rendered"
OVERLAYS = ("cpu", "gpu", "laptop", "ci")
"""`ci` has every component."""

Object = dict[str, Any]

SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "services.embedding": EmbeddingSettings,
    "services.rerank": RerankSettings,
    "services.search": SearchSettings,
}
"""The settings of each process, by the module that its command runs."""

NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def quantity(text: str | float) -> float:
    """Return a Kubernetes quantity, such as `500m` or `2Gi`, as a number."""
    digits = str(text).rstrip("mkKMGTi")
    return float(digits) * _UNITS[str(text)[len(digits) :]]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector, in the form with matchLabels and matchExpressions, takes *labels*; an empty one takes all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        value, values = labels.get(expression["key"]), expression.get("values", [])
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not holds:
            return False
    return True


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet; it has one container."""

    object: Object

    @property
    def name(self) -> str:
        """What it is called."""
        return str(self.object["metadata"]["name"])

    @property
    def kind(self) -> str:
        """Deployment or StatefulSet."""
        return str(self.object["kind"])

    @property
    def spec(self) -> Object:
        """Its spec."""
        return dict(self.object["spec"])

    @property
    def labels(self) -> dict[str, str]:
        """Those of its pods."""
        return dict(self.spec["template"]["metadata"]["labels"])

    @property
    def annotations(self) -> dict[str, str]:
        """Those of its pods."""
        return dict(self.spec["template"]["metadata"].get("annotations", {}))

    @property
    def pod(self) -> Object:
        """The spec of its pods."""
        return dict(self.spec["template"]["spec"])

    @property
    def container(self) -> Object:
        """The one container of its pods."""
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def module(self) -> str | None:
        """The module of ours that it runs; None for other people's programs."""
        command = self.container["command"]
        return str(command[2]) if command[:2] == ["python", "-m"] else None

    @property
    def ports(self) -> dict[str, int]:
        """Its container's ports by name."""
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def probes(self) -> dict[str, Object]:
        """Return its container's probes by name."""
        return {name: self.container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}


class Overlay:
    """Everything that one overlay makes."""

    def __init__(self, name: str, objects: list[Object]) -> None:
        self.name = name
        self.objects = objects

    def of(self, kind: str) -> list[Object]:
        """Return the objects of *kind*."""
        return [item for item in self.objects if item["kind"] == kind]

    def find(self, kind: str, name: str) -> Object | None:
        """Return an object; None where there is none."""
        return next((item for item in self.of(kind) if item["metadata"]["name"] == name), None)

    @cached_property
    def workloads(self) -> list[Workload]:
        """The Deployments and StatefulSets."""
        return [Workload(item) for kind in ("Deployment", "StatefulSet") for item in self.of(kind)]

    @property
    def ours(self) -> list[Workload]:
        """The workloads that run a service of ours."""
        return [workload for workload in self.workloads if workload.module]

    def workload(self, name: str) -> Workload:
        """Return the workload called *name*."""
        return next(workload for workload in self.workloads if workload.name == name)

    def autoscaled(self) -> dict[str, Object]:
        """Return what sets the replicas of Deployments, HorizontalPodAutoscalers and ScaledObjects, by the target's name."""
        found = [*self.of("HorizontalPodAutoscaler"), *self.of("ScaledObject")]
        return {item["spec"]["scaleTargetRef"]["name"]: item for item in found}

    def replicas(self, workload: Workload, *, most: bool = False) -> int:
        """Return how many pods a workload has at least, or at *most*."""
        scaler = self.autoscaled().get(workload.name)
        if scaler is None:
            return int(workload.spec["replicas"])
        spec, kind = scaler["spec"], "max" if most else "min"
        return int(spec.get(f"{kind}Replicas", spec.get(f"{kind}ReplicaCount")))

    def config(self, name: str, key: str) -> str:
        """Return an entry of a ConfigMap. Raises KeyError."""
        item = self.find("ConfigMap", name)
        if item is None:
            raise KeyError(f"{self.name}: there is no ConfigMap {name}")
        return str(item["data"][key])

    def secret(self, name: str, key: str) -> str:
        """Return an entry of a Secret; of one that the operator makes, what the overlay `ci` has. Raises KeyError."""
        item = self.find("Secret", name)
        if item is None and name in OPERATORS_SECRETS.get(self.name, ()):
            item = load("ci").find("Secret", name)
        if item is None:
            raise KeyError(f"{self.name}: there is no Secret {name}")
        return base64.b64decode(item["data"][key]).decode()

    def environment(self, workload: Workload) -> dict[str, str]:
        """Return the environment of a workload's process, every reference looked up. Raises KeyError where one dangles."""
        return {entry["name"]: self._value(workload, entry) for entry in workload.container["env"]}

    def _value(self, workload: Workload, entry: Object) -> str:
        if "value" in entry:
            return str(entry["value"])
        ((source, reference),) = entry["valueFrom"].items()
        if source == "configMapKeyRef":
            return self.config(reference["name"], reference["key"])
        if source == "secretKeyRef":
            return self.secret(reference["name"], reference["key"])
        assert source == "resourceFieldRef", source
        assert reference["containerName"] == workload.container["name"]
        place, resource = reference["resource"].split(".", 1)
        return str(
            math.ceil(quantity(workload.container["resources"][place][resource]) / quantity(reference["divisor"]))
        )


OPERATORS_SECRETS: Mapping[str, tuple[str, ...]] = {"laptop": ("api-keys",)}
"""The Secrets that an overlay leaves to the operator; docs/deploy.md makes them."""


@cache
def load(overlay: str) -> Overlay:
    """Return the committed rendering of *overlay*."""
    text = (RENDERED / f"{overlay}.yaml").read_text()
    return Overlay(overlay, [item for item in yaml.load_all(text, Loader=yaml.CSafeLoader) if item])


def each_workload(*, ours: bool = False) -> Iterator[tuple[Overlay, Workload]]:
    """Yield every workload of every overlay; with *ours* only those that run a service of ours."""
    for name in OVERLAYS:
        overlay = load(name)
        for workload in overlay.ours if ours else overlay.workloads:
            yield overlay, workload


def settings_of(overlay: Overlay, workload: Workload, patch: pytest.MonkeyPatch) -> ServiceSettings:
    """
    Return what the service's own code makes of a workload's environment, which replaces this process's until *patch* ends.

    Raises:
        SettingsError: The service would refuse to start with it.
    """
    assert workload.module
    for variable in list(os.environ):
        patch.delenv(variable)
    for variable, value in overlay.environment(workload).items():
        patch.setenv(variable, value)
    return read_settings(SETTINGS[workload.module], os.environ)
