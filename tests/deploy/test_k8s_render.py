"""The committed renderings are what deploy/k8s says, and every object in them is one that Kubernetes knows."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from tests.deploy.manifests import K8S, OVERLAYS, RENDERED, Object, Overlay, load
from tests.deploy.render import RULES, WRAPPED, has_kubectl, render, wrapped_rules

VERSIONS = ("1.30.0", "1.31.0", "1.32.0", "1.33.0")
CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule", "Gateway", "HTTPRoute"}
"""What Kubernetes itself does not know, and has no schema here."""

needs_kubectl = pytest.mark.skipif(not has_kubectl(), reason="there is no kubectl to render the overlays with")


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_the_rendering_is_current(name: str):
    """What is committed is what kustomize makes now; `make k8s-render` writes it."""
    assert render(name) == (RENDERED / f"{name}.yaml").read_text()


@needs_kubectl
def test_the_default_target_is_the_cpu_overlay():
    """`kubectl apply -k deploy/k8s` makes what the overlay `cpu` has."""
    assert render("") == (RENDERED / "cpu.yaml").read_text()


def test_every_overlay_is_checked():
    """No overlay is without a committed rendering, and no rendering without an overlay."""
    assert {path.name for path in (K8S / "overlays").iterdir()} == set(OVERLAYS)
    assert {path.stem for path in RENDERED.iterdir()} == set(OVERLAYS)


def test_the_overlay_ci_has_every_component():
    """What no overlay takes would be checked by nothing; `small` is in the overlay `laptop`."""
    used = set()
    for name in ("ci", "laptop"):
        used |= {path.rsplit("/", 1)[-1] for path in _kustomization(f"overlays/{name}")["components"]}
    for component in ("ingress", "gateway"):
        used |= {path.rsplit("/", 1)[-1] for path in _kustomization(f"components/{component}")["components"]}
    assert used - {"secrets"} == {path.name for path in (K8S / "components").iterdir()}


def test_the_default_target_has_no_custom_resource():
    """A plain cluster takes it: custom resources are in components only."""
    for name in ("cpu", "gpu", "laptop"):
        assert not CUSTOM & {item["kind"] for item in load(name).objects}


def test_shard_nodes_are_one_template():
    """The directories of two shard nodes differ in the number alone, and the number is the directory's."""
    nodes = {path.parent.name: path for path in (K8S / "base" / "nodes").glob("shard-*/kustomization.yaml")}
    texts = {
        re.sub(rf"""(shard-|["'-]){name.removeprefix("shard-")}\b""", r"\1#", path.read_text())
        for name, path in nodes.items()
    }
    assert len(texts) == 1
    assert nodes.keys() == {f"shard-{number}" for number in range(len(nodes))}


def test_rules_are_those_of_the_observability_directory():
    """Each PrometheusRule is a file of deploy/observability/rules, as `make k8s-render` wraps it."""
    assert {path.name: path.read_text() for path in WRAPPED.glob("*.yaml")} == wrapped_rules()
    wrapped = {item["metadata"]["name"]: item["spec"] for item in load("ci").of("PrometheusRule")}
    plain = {f"tercet-{path.stem}": yaml.safe_load(path.read_text()) for path in RULES.glob("*.yaml")}
    assert wrapped == plain


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_fit_the_schemas(version: str):
    """Every object of every overlay is valid, without an unknown field, in each supported version of Kubernetes."""
    seen: set[str] = set()
    for overlay in map(load, OVERLAYS):
        for item in overlay.objects:
            text = json.dumps(item, sort_keys=True)
            if item["kind"] in CUSTOM or text in seen:
                continue
            seen.add(text)
            validator = _validator(version, item["kind"], item["apiVersion"])
            faults = [f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in validator.iter_errors(item)]
            assert not faults, f"{overlay.name}: {item['kind']} {item['metadata']['name']}: {faults}"
    assert seen


def test_a_schema_finds_a_fault():
    """An unknown field and a wrong type are refused, so the check above is one."""
    wrong: Object = {"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": "http"}], "selectors": {}}}
    assert len(list(_validator("1.30.0", "Service", "v1").iter_errors(wrong))) == 2


def test_names_are_unique(overlay: Overlay):
    """No object is there twice: the second would replace the first."""
    names = [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in overlay.objects]
    assert len(names) == len(set(names))


def _kustomization(place: str) -> Any:
    return yaml.safe_load((K8S / place / "kustomization.yaml").read_text())


@cache
def _definitions(version: str) -> Registry[Any]:
    return Resource.from_contents(_schema(version, "_definitions")) @ Registry()


def _schema(version: str, name: str) -> Any:
    schemas = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    return json.loads((schemas / f"{name}.json").read_text())


@cache
def _validator(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """Return the validator that kubernetes_validate makes, kept: it reads all definitions anew for each object."""
    group, _, api = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], api) if part)
    schema = _schema(version, name)
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))
