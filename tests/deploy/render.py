"""
What is written from deploy/k8s and deploy/observability: `python -m tests.deploy.render` writes it, tests compare it.

The rules of Prometheus are wrapped into PrometheusRules, and each overlay is rendered into deploy/k8s/rendered.
"""

import shutil
import subprocess

import yaml

from tests.deploy.manifests import K8S, OVERLAYS, RENDERED, ROOT

RULES = ROOT / "deploy" / "observability" / "rules"
WRAPPED = K8S / "components" / "prometheus-operator" / "rules"

HEADER = "# Written by `make k8s-render`; change {source} instead.\n"


def render(overlay: str) -> str:
    """Return what kustomize makes of *overlay* (or of the default target, for "")."""
    place = K8S / "overlays" / overlay if overlay else K8S
    command = ["kubectl", "kustomize", str(place)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def has_kubectl() -> bool:
    """Whether overlays can be rendered here."""
    return shutil.which("kubectl") is not None


def wrapped_rules() -> dict[str, str]:
    """Return the files of the component's rules/ by name: a PrometheusRule for each file of rules, and their list."""
    files = {}
    for path in sorted(RULES.glob("*.yaml")):
        source = path.relative_to(ROOT).as_posix()
        wrapped = {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": f"tercet-{path.stem}"},
            "spec": yaml.safe_load(path.read_text()),
        }
        text = yaml.safe_dump(wrapped, sort_keys=False, width=130, allow_unicode=True)
        files[path.name] = HEADER.format(source=source) + text
    listing = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(files),
    }
    source = RULES.relative_to(ROOT).as_posix()
    files["kustomization.yaml"] = HEADER.format(source=source) + yaml.safe_dump(listing, sort_keys=False)
    return files


def main() -> None:
    """Write the rules first, as the overlay `ci` has them, then the overlays."""
    WRAPPED.mkdir(exist_ok=True)
    files = wrapped_rules()
    for stale in {path.name for path in WRAPPED.glob("*.yaml")} - files.keys():
        (WRAPPED / stale).unlink()
    for name, text in files.items():
        (WRAPPED / name).write_text(text)
    RENDERED.mkdir(exist_ok=True)
    for overlay in OVERLAYS:
        (RENDERED / f"{overlay}.yaml").write_text(render(overlay))


if __name__ == "__main__":
    main()
