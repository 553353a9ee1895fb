"""Connections are those that the design draws; Services reach the pods that they name."""

from collections.abc import Callable

import pytest

from tests.deploy.manifests import NAME, OVERLAYS, Overlay, load, selects
from tests.deploy.network import Peer, may_connect, may_enter, may_leave, pods

ARROWS = {
    ("search", "embedding", 8001),
    ("search", "rerank", 8002),
    ("search", "shard", 8010),
    ("search", "fallback", 8010),
    ("search", "redis", 6379),
    ("search", "postgres", 5432),
    ("embedding", "redis", 6379),
    ("rerank", "redis", 6379),
    ("shard", "postgres", 5432),
    ("fallback", "postgres", 5432),
}
"""The arrows between the parts, as the picture in ARCHITECTURE.md has them."""

SERVICES = {"embedding": 8001, "rerank": 8002, "search": 8000, "shard": 8010, "fallback": 8010}
PORTS = {*SERVICES.values(), 6379, 5432, 53, 80, 443, 4318, 9999}


def _namespace(name: str, **labels: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name, **labels}


DNS = Peer("dns", {"k8s-app": "kube-dns"}, _namespace("kube-system"))
LOCAL_DNS = Peer("local dns", address="169.254.20.10")
PROMETHEUS = Peer("prometheus", {NAME: "prometheus"}, _namespace("monitoring"))
COLLECTOR = Peer("collector", {NAME: "opentelemetry-collector"}, _namespace("monitoring"))
CLIENT = Peer("client", {}, {**_namespace("shop"), "tercet.io/client": "true"})
STRANGER = Peer("stranger", {"tercet.io/client": "true", NAME: "search"}, _namespace("shop"))
LODGER = Peer("lodger", {NAME: "lodger"}, _namespace("tercet"))
TRAEFIK = Peer("traefik", {NAME: "traefik"}, _namespace("kube-system"))
ENVOY = Peer("envoy", {"app.kubernetes.io/managed-by": "envoy-gateway"}, _namespace("envoy-gateway-system"))
INTERNET = Peer("internet", address="203.0.113.7")
OUTSIDE = (DNS, LOCAL_DNS, PROMETHEUS, COLLECTOR, CLIENT, STRANGER, LODGER, TRAEFIK, ENVOY, INTERNET)


def _outside(overlay: Overlay) -> set[tuple[str, str, int]]:
    """Return what may pass between our pods and what is not ours."""
    allowed = {(PROMETHEUS.name, service, port) for service, port in SERVICES.items()}
    allowed |= {(CLIENT.name, "search", 8000)}
    allowed |= {(service, resolver.name, 53) for service in SERVICES for resolver in (DNS, LOCAL_DNS)}
    if overlay.name in ("laptop", "ci"):
        allowed |= {(TRAEFIK.name, "search", 8000)}
    if overlay.name == "ci":
        allowed |= {(ENVOY.name, "search", 8000)}
        allowed |= {(service, COLLECTOR.name, 4318) for service in SERVICES}
        followers = ("search", "shard", "fallback")
        allowed |= {(service, peer.name, 5432) for service in followers for peer in (INTERNET, LOCAL_DNS)}
    return allowed


@pytest.mark.parametrize("name", OVERLAYS)
def test_connections_are_the_arrows_of_the_design(name: str):
    """Between any two pods, and any pod and anything else, what the design draws can pass, and nothing else can."""
    overlay = load(name)
    inside = pods(overlay)
    there = {peer.labels[NAME] for peer in inside}
    expected = {arrow for arrow in ARROWS if set(arrow[:2]) <= there} | _outside(overlay)
    found = {
        (
            source.labels[NAME] if source in inside else source.name,
            target.labels[NAME] if target in inside else target.name,
            port,
        )
        for source in (*inside, *OUTSIDE)
        for target in (*inside, *OUTSIDE)
        if source in inside or target in inside
        for port in PORTS
        if may_connect(overlay, source, target, port)
    }
    assert found == expected


@pytest.mark.parametrize("allows", [may_leave, may_enter])
def test_either_end_alone_allows_no_more(allows: Callable[..., bool], overlay: Overlay):
    """The policies of the caller, and those of the called, each draw the design's arrows between our pods by themselves."""
    inside = [*pods(overlay), LODGER]
    found = {
        (source.labels[NAME], target.labels[NAME], port)
        for source in inside
        for target in inside
        for port in PORTS
        if allows(overlay, source, target, port)
    }
    there = {peer.labels[NAME] for peer in inside}
    assert found == {arrow for arrow in ARROWS if set(arrow[:2]) <= there}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_of_a_kind_is_reached(name: str):
    """An arrow to the shards is one to each of them, and one to embedding is one to both of its pools."""
    overlay = load(name)
    inside = pods(overlay)
    for source in inside:
        for target in inside:
            for start, end, port in ARROWS:
                if (start, end) == (source.labels[NAME], target.labels[NAME]):
                    assert may_connect(overlay, source, target, port), (source.name, target.name)


def test_a_new_pod_can_do_nothing(overlay: Overlay):
    """A pod that no policy names may neither call nor be called, though it is in the namespace."""
    for peer in (*pods(overlay), *OUTSIDE):
        if peer is not LODGER:
            assert not any(may_connect(overlay, LODGER, peer, port) for port in PORTS)
            assert not any(may_connect(overlay, peer, LODGER, port) for port in PORTS)


def test_names_are_looked_up_by_udp(overlay: Overlay):
    """Who calls others by name may ask the resolver, over UDP and TCP."""
    for pod in pods(overlay):
        asks = pod.labels[NAME] in SERVICES
        for resolver in (DNS, LOCAL_DNS):
            assert may_connect(overlay, pod, resolver, 53, "UDP") is asks
        assert not may_connect(overlay, pod, INTERNET, 53, "UDP")


def test_services_reach_their_pods(overlay: Overlay):
    """Each Service selects pods of one kind, which have the port it names; each workload has its Service."""
    for service in overlay.of("Service"):
        spec = service["spec"]
        taken = [item for item in overlay.workloads if selects({"matchLabels": spec["selector"]}, item.labels)]
        assert len({item.labels[NAME] for item in taken}) == 1, service["metadata"]["name"]
        for port in spec["ports"]:
            assert all(port["targetPort"] in item.ports for item in taken)
            assert port["port"] == (
                80 if service["metadata"]["name"] == "search" else taken[0].ports[port["targetPort"]]
            )
        headless = taken[0].labels[NAME] not in ("search", "redis", "postgres")
        assert (spec.get("clusterIP") == "None") is headless
    for item in overlay.workloads:
        service_name = item.spec.get("serviceName", item.name)
        found = overlay.find("Service", service_name)
        assert found is not None
        assert selects({"matchLabels": found["spec"]["selector"]}, item.labels)


def test_the_gpu_pool_answers_to_both_names():
    """`embedding` has the pods of both pools, `embedding-gpu` those with a GPU; the same holds for rerank."""
    overlay = load("gpu")
    for kind in ("embedding", "rerank"):
        for service, expected in ((kind, {kind, f"{kind}-gpu"}), (f"{kind}-gpu", {f"{kind}-gpu"})):
            found = overlay.find("Service", service)
            assert found is not None
            selector = {"matchLabels": found["spec"]["selector"]}
            assert {item.name for item in overlay.workloads if selects(selector, item.labels)} == expected


def test_the_outside_comes_in_at_search():
    """Ingress and route name the Service of search, a port that it has, and the same host."""
    ingress = load("ci").find("Ingress", "search")
    route = load("ci").find("HTTPRoute", "search")
    gateway = load("ci").find("Gateway", "tercet")
    assert ingress is not None
    assert route is not None
    assert gateway is not None
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    service = load("ci").find("Service", path["backend"]["service"]["name"])
    assert service is not None
    (port,) = service["spec"]["ports"]
    assert path["backend"]["service"] == {"name": "search", "port": {"name": port["name"]}}
    assert route["spec"]["hostnames"] == [rule["host"]]
    assert route["spec"]["rules"][0]["backendRefs"] == [{"name": "search", "port": port["port"]}]
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
