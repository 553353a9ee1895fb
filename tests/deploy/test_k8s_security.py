"""Pods hold to the restricted Pod Security standard, take what they need alone, and are labelled."""

import copy
from collections.abc import Callable, Iterator

import pytest

from tests.deploy.manifests import COMPONENT, K8S, NAME, Object, Overlay, each_workload, load, quantity, selects

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}

all_workloads = pytest.mark.parametrize(
    ("overlay", "workload"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in each_workload()]
)


def violations(pod: Object) -> list[str]:
    """
    Return what the restricted Pod Security standard forbids in *pod*, control by control.

    Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (baseline and restricted).
    """
    return [*_of_the_pod(pod), *(fault for container in _containers(pod) for fault in _of_a_container(pod, container))]


def _containers(pod: Object) -> list[Object]:
    return [item for kind in ("containers", "initContainers", "ephemeralContainers") for item in pod.get(kind, [])]


def _of_the_pod(pod: Object) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    context = pod.get("securityContext", {})
    yield from (f"sysctl {item['name']}" for item in context.get("sysctls", []) if item["name"] not in SYSCTLS)
    for volume in pod.get("volumes", []):
        yield from (f"volume {kind}" for kind in volume.keys() - {"name"} - VOLUMES)


def _of_a_container(pod: Object, container: Object) -> Iterator[str]:
    whole, own = pod.get("securityContext", {}), container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    seccomp = own.get("seccompProfile", whole.get("seccompProfile", {}))
    apparmor = own.get("appArmorProfile", whole.get("appArmorProfile", {"type": "RuntimeDefault"}))
    selinux = own.get("seLinuxOptions", whole.get("seLinuxOptions", {}))
    windows = own.get("windowsOptions", whole.get("windowsOptions", {}))
    user = own.get("runAsUser", whole.get("runAsUser"))
    forbidden = {
        "privileged": bool(own.get("privileged")),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
        "capabilities.drop": "ALL" not in capabilities.get("drop", []),
        "capabilities.add": not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
        "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
        "procMount": own.get("procMount", "Default") != "Default",
        "seccompProfile": seccomp.get("type") not in ("RuntimeDefault", "Localhost"),
        "appArmorProfile": apparmor.get("type") not in ("RuntimeDefault", "Localhost"),
        "seLinuxOptions": selinux.get("type") not in SELINUX_TYPES or bool({"user", "role"} & selinux.keys()),
        "hostProcess": bool(windows.get("hostProcess")),
        "runAsNonRoot": own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True,
        "runAsUser": user == 0,
    }
    yield from (name for name, is_so in forbidden.items() if is_so)


@all_workloads
def test_pods_are_restricted(overlay: Overlay, workload):
    """Every control of the restricted standard holds, and more: a user by number, and a read-only root."""
    assert not violations(workload.pod)
    context = workload.pod["securityContext"]
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] > 0
    if workload.module:
        assert context["runAsUser"] == 10001
    assert all(
        container["securityContext"]["readOnlyRootFilesystem"] is True for container in _containers(workload.pod)
    )


@pytest.mark.parametrize(
    ("fault", "spoil"),
    [
        ("hostNetwork", lambda pod: pod.update(hostNetwork=True)),
        ("hostPID", lambda pod: pod.update(hostPID=True)),
        ("volume hostPath", lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
        ("sysctl kernel.msgmax", lambda pod: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}])),
        ("seccompProfile", lambda pod: pod["securityContext"].pop("seccompProfile")),
        ("runAsNonRoot", lambda pod: pod["securityContext"].pop("runAsNonRoot")),
        ("runAsUser", lambda pod: pod["securityContext"].update(runAsUser=0)),
        ("privileged", lambda pod: pod["containers"][0]["securityContext"].update(privileged=True)),
        ("capabilities.drop", lambda pod: pod["containers"][0]["securityContext"].pop("capabilities")),
        (
            "capabilities.add",
            lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        ),
        (
            "allowPrivilegeEscalation",
            lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        ),
        ("hostPort", lambda pod: pod["containers"][0]["ports"][0].update(hostPort=80)),
        ("procMount", lambda pod: pod["containers"][0]["securityContext"].update(procMount="Unmasked")),
        ("appArmorProfile", lambda pod: pod["securityContext"].update(appArmorProfile={"type": "Unconfined"})),
        ("seLinuxOptions", lambda pod: pod["securityContext"].update(seLinuxOptions={"type": "spc_t"})),
        ("hostProcess", lambda pod: pod["securityContext"].update(windowsOptions={"hostProcess": True})),
    ],
)
def test_the_check_sees_each_fault(fault: str, spoil: Callable[[Object], object]):
    """A pod that breaks one control is found out."""
    pod = copy.deepcopy(load("cpu").workload("search").pod)
    spoil(pod)
    assert violations(pod) == [fault]


def test_the_namespace_enforces_the_standard(overlay: Overlay):
    """The one namespace refuses pods that are not restricted, and every namespaced object is in it."""
    (namespace,) = overlay.of("Namespace")
    labels = namespace["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"] == "v1.30"
    for item in overlay.objects:
        expected = None if item["kind"] in ("Namespace", "PriorityClass") else namespace["metadata"]["name"]
        assert item["metadata"].get("namespace") == expected, item["metadata"]["name"]


@all_workloads
def test_accounts_have_no_token(overlay: Overlay, workload):
    """Each kind of pod has an account of its own, which says nothing to the API server; no Role is there at all."""
    account = overlay.find("ServiceAccount", workload.pod["serviceAccountName"])
    assert account is not None
    assert account["metadata"]["name"] == workload.labels[NAME]
    assert account["automountServiceAccountToken"] is False
    assert workload.pod["automountServiceAccountToken"] is False
    assert workload.pod["enableServiceLinks"] is False
    assert not any("Role" in item["kind"] for item in overlay.objects)


@all_workloads
def test_nothing_is_unlimited(overlay: Overlay, workload):
    """Every container says what it needs and may take; where latency matters both are the same, but on a laptop."""
    for container in _containers(workload.pod):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests.keys() == limits.keys() >= {"cpu", "memory", "ephemeral-storage"}
        assert all(quantity(requests[name]) <= quantity(limits[name]) for name in limits)
        if overlay.name != "laptop":
            assert requests == limits
    for volume in workload.pod.get("volumes", []):
        if "emptyDir" in volume:
            size = quantity(volume["emptyDir"]["sizeLimit"])
            resource = "memory" if volume["emptyDir"].get("medium") == "Memory" else "ephemeral-storage"
            assert size <= quantity(workload.container["resources"]["limits"][resource]) * 0.9


@all_workloads
def test_images_are_pinned(overlay: Overlay, workload):
    """Each image has a version, and none is `latest`."""
    for container in _containers(workload.pod):
        tag = container["image"].rsplit(":", 1)[1]
        assert tag[0].isdigit()


def test_images_are_set_in_one_place():
    """No manifest but the component `common` has an image's version."""
    for path in K8S.rglob("*.yaml"):
        if "rendered" not in path.parts and path.parent.name != "common":
            lines = [line for line in path.read_text().splitlines() if "image: " in line or "newTag" in line]
            assert not [line for line in lines if ":" in line.split("image: ")[-1].split("#")[0]], path


@all_workloads
def test_pods_are_labelled(overlay: Overlay, workload):
    """Every pod says what it is, which workload it is of, and that it is a part of Tercet; selectors hold what never changes."""
    labels = workload.labels
    assert labels[NAME] in {"embedding", "rerank", "search", "shard", "fallback", "redis", "postgres"}
    assert labels[COMPONENT] == workload.name
    assert labels["app.kubernetes.io/part-of"] == "tercet"
    assert workload.spec["selector"]["matchLabels"].keys() == {NAME, COMPONENT}
    assert selects(workload.spec["selector"], labels)
    for claim in workload.spec.get("volumeClaimTemplates", []):
        assert "app.kubernetes.io/version" not in claim["metadata"].get("labels", {}), (
            "a claim's template never may change"
        )


def test_every_object_is_labelled(overlay: Overlay):
    """Everything that is made can be found by one label."""
    for item in overlay.objects:
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "tercet", item["metadata"]["name"]


@all_workloads
def test_mounts_have_volumes(overlay: Overlay, workload):
    """Every mount names a volume or a claim, every volume is mounted, and what is written lies in one that can be written."""
    claims = {claim["metadata"]["name"] for claim in workload.spec.get("volumeClaimTemplates", [])}
    volumes = {volume["name"] for volume in workload.pod.get("volumes", [])}
    mounts = {mount["name"]: mount for container in _containers(workload.pod) for mount in container["volumeMounts"]}
    assert mounts.keys() == claims | volumes
    places = {mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")}
    assert "/tmp" in places
    environment = overlay.environment(workload)
    for variable in ("SEARCH_DATA_DIR", "EMBEDDING_MODEL_CACHE_DIR", "RERANK_MODEL_CACHE_DIR"):
        assert environment.get(variable, "/tmp") in places
    if "PGDATA" in environment:
        assert any(environment["PGDATA"].startswith(f"{place}/") for place in places)
