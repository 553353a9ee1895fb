"""What NetworkPolicies let through: who may open a connection to whom, computed as the API's documentation says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tests.deploy.manifests import Object, Overlay, selects

NAMESPACE = "tercet"


@dataclass(frozen=True)
class Peer:
    """Something that may open or take connections: a pod of a namespace, or an address outside the cluster."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    address: str | None = None

    @property
    def ours(self) -> bool:
        """Whether our policies rule it."""
        return self.namespace.get("kubernetes.io/metadata.name") == NAMESPACE


def pods(overlay: Overlay) -> list[Peer]:
    """Return a pod of each workload."""
    namespace = {"kubernetes.io/metadata.name": NAMESPACE}
    return [Peer(item.name, item.labels, namespace, item.ports) for item in overlay.workloads]


def may_connect(overlay: Overlay, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether *source* may open a connection to *target*: the one's egress and the other's ingress must both allow it."""
    return may_leave(overlay, source, target, port, protocol) and may_enter(overlay, source, target, port, protocol)


def may_leave(overlay: Overlay, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of *source* let a connection to *target* out."""
    return _allows(overlay, "Egress", source, target, target, port, protocol)


def may_enter(overlay: Overlay, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of *target* let a connection from *source* in."""
    return _allows(overlay, "Ingress", target, source, target, port, protocol)


def _allows(overlay: Overlay, way: str, ruled: Peer, other: Peer, target: Peer, port: int, protocol: str) -> bool:
    if not ruled.ours:
        return True
    policies = [policy["spec"] for policy in overlay.of("NetworkPolicy")]
    mine = [spec for spec in policies if way in spec["policyTypes"] and selects(spec["podSelector"], ruled.labels)]
    rules = [rule for spec in mine for rule in spec.get(way.lower(), [])]
    end = "to" if way == "Egress" else "from"
    return not mine or any(
        _names(rule.get(end, []), other) and _takes(rule.get("ports", []), target, port, protocol) for rule in rules
    )


def _names(ends: list[Object], peer: Peer) -> bool:
    return not ends or any(_is(end, peer) for end in ends)


def _is(end: Object, peer: Peer) -> bool:
    if "ipBlock" in end:
        block = end["ipBlock"]
        return peer.address is not None and ip_address(peer.address) in ip_network(block["cidr"])
    if peer.address is not None:
        return False
    in_namespace = selects(end["namespaceSelector"], peer.namespace) if "namespaceSelector" in end else peer.ours
    return in_namespace and selects(end.get("podSelector", {}), peer.labels)


def _takes(ports: list[Object], target: Peer, port: int, protocol: str) -> bool:
    return not ports or any(
        item.get("protocol", "TCP") == protocol and target.ports.get(str(item["port"]), item["port"]) == port
        for item in ports
    )
