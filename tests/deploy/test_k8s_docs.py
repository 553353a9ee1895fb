"""docs/deploy.md's ten commands do what they say, as far as that can be told without Docker and a cluster."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import yaml

from services.common.auth import open_key_ring
from services.common.wire.documents import WriteRequest
from services.common.wire.search import SearchRequest
from services.search.app import create_app
from services.search.routes import scope_needed
from services.search.settings import SearchSettings
from tests.deploy.manifests import K8S, ROOT, Workload, each_workload, load, quantity
from tests.deploy.render import has_kubectl, render

PAGE = (ROOT / "docs" / "deploy.md").read_text()
OVERLAY = load("laptop")
JSON = {"content-type": "application/json"}
BUILD, CLUSTER, IMPORT, SEARCH_KEY, CLIENT_KEY, APPLY, SECRET, WAIT, WRITE, SEARCH = range(10)


def _commands() -> list[str]:
    """Return the commands of the section, one for each numbered step, lines that go on joined."""
    section = PAGE.split("## Ten commands\n")[1].split("\n## ")[0]
    steps = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    return ["\n".join(re.findall(r"^ {7,}(\S.*)$", step, re.MULTILINE)).replace("\\\n", " ") for step in steps]


COMMANDS = _commands()


def _ours() -> set[str]:
    return {workload.container["image"] for workload in OVERLAY.ours}


def test_there_are_ten():
    """Ten steps, each one command that a shell can read."""
    assert len(COMMANDS) == 10
    for command in COMMANDS:
        assert command
        assert "\n" not in command
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)


def test_the_images_that_are_built_are_those_that_run():
    """Each target is one of the Dockerfile, each tag the manifests'; what is brought into the cluster is what its pods name."""
    targets, tag = re.match(
        r"for target in (.+?); do docker build --target \$target --tag (\S+) \. ", COMMANDS[BUILD]
    ).groups()  # type: ignore[union-attr]
    stages = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    built = {tag.replace("$target", target) for target in targets.split()}
    assert set(targets.split()) <= set(stages)
    assert built == _ours() | {f"tercet-tools:{next(iter(_ours())).split(':')[1]}"}
    brought = [word for word in shlex.split(COMMANDS[IMPORT]) if ":" in word]
    assert set(brought) == _ours()
    assert "--cluster tercet" in COMMANDS[IMPORT]


def test_the_cluster_is_new_enough():
    """k3s is of a version that takes the manifests, and its ingress is on the port that the searches go to."""
    (version,) = re.findall(r"rancher/k3s:v1\.(\d+)\.", COMMANDS[CLUSTER])
    assert int(version) >= 30
    assert COMMANDS[CLUSTER].startswith("k3d cluster create tercet ")
    (port,) = re.findall(r"--port (\d+):80@loadbalancer", COMMANDS[CLUSTER])
    assert {urlsplit(_curl(COMMANDS[step])["url"]).port for step in (WRITE, SEARCH)} == {int(port)}


def test_the_overlay_is_there():
    """What is applied exists, and renders to what is checked."""
    place = ROOT / shlex.split(COMMANDS[APPLY])[-1]
    assert place == K8S / "overlays" / OVERLAY.name
    assert (place / "kustomization.yaml").is_file()
    if has_kubectl():
        assert "kind: Ingress" in render(OVERLAY.name)


@pytest.mark.skipif(not has_kubectl(), reason="there is no kubectl to make the Secret with")
def test_the_keys_work(tmp_path: Path):
    """The commands for keys, run by the real CLI and kubectl, make the Secret that the pods mount, with keys that fit."""
    made = _make_secret(tmp_path)
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == ("api-keys", "tercet")
    files = {}
    for name in ("clients.json", "peers.json"):
        files[name] = tmp_path / name
        files[name].write_text(made["stringData"][name])
    peer_key, client_key = made["stringData"]["peer-key"], (tmp_path / "client.key").read_text().splitlines()[0]
    peers = open_key_ring(SearchSettings(api_keys_file=files["peers.json"]))
    clients = open_key_ring(SearchSettings(api_keys_file=files["clients.json"]))
    assert peers is not None
    assert clients is not None
    peer, client = peers.find(peer_key.encode()), clients.find(client_key.encode())
    assert peer is not None
    assert client is not None
    assert all(peer.may(scope) for scope in ("embed", "rerank", "search"))
    for step in (WRITE, SEARCH):
        asked = _curl(COMMANDS[step])
        assert client.may(scope_needed("POST", urlsplit(asked["url"]).path))
        assert "Bearer $(sed -n 1p client.key)" in asked["header"]
    assert made["stringData"].keys() == _wanted("api-keys")


def test_other_secrets_have_the_entries_that_pods_read():
    """The commands of the chapters on ledger and Redis give the entries that the components name."""
    for name in ("ledger", "redis-auth"):
        (command,) = re.findall(rf"    (kubectl create secret generic {name} (?:.*\\\n)*.*)", PAGE)
        given = {
            word.split("=")[1]
            for word in shlex.split(command.replace("\\\n", ""))
            if word.startswith("--from-literal=")
        }
        assert given == _wanted(name, "ci"), name


def test_all_pods_are_waited_for():
    """The wait is for the namespace's pods, for longer than any of them may take to begin."""
    words = shlex.split(COMMANDS[WAIT])
    assert words[words.index("--namespace") + 1] == OVERLAY.of("Namespace")[0]["metadata"]["name"]
    (minutes,) = [
        int(word.removeprefix("--timeout=").removesuffix("m")) for word in words if word.startswith("--timeout=")
    ]
    budgets = [
        probes["startupProbe"]["periodSeconds"] * probes["startupProbe"]["failureThreshold"]
        for probes in (workload.probes() for workload in OVERLAY.workloads)
    ]
    assert minutes * 60 > max(budgets)


@pytest.mark.parametrize("step", [WRITE, SEARCH])
async def test_requests_are_ones_that_search_takes(step: int, tmp_path: Path):
    """Each goes to the ingress's host, to a route of the router, with a body that the route's own model takes."""
    asked = _curl(COMMANDS[step])
    url = urlsplit(asked["url"])
    ingress = OVERLAY.find("Ingress", "search")
    assert ingress is not None
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == [url.hostname]
    app = create_app(SearchSettings(data_dir=tmp_path))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://pod") as client:
        answers = [
            await client.post(path, content=asked["body"], headers=JSON) for path in (url.path, f"{url.path}-not")
        ]
    assert [answer.status_code for answer in answers] == [503, 404]  # The one route is there, though it has not begun.
    body = json.loads(asked["body"])
    if step == WRITE:
        assert len(WriteRequest.model_validate(body).documents) == 2
    else:
        assert SearchRequest.model_validate(body).query


def test_the_table_of_workloads_is_true():
    """The page's numbers of pods are the manifests' own, and so is the sum of what they request."""
    overlay = load("cpu")
    rows = {row[0]: row[1] for row in re.findall(r"^\| (`.+?`) \| \w+ \| ([\d–]+) \|", PAGE, re.MULTILINE)}
    expected: dict[str, str] = {}
    cpus = gibibytes = 0.0
    for workload in overlay.workloads:
        least, most = overlay.replicas(workload), overlay.replicas(workload, most=True)
        expected[workload.name] = str(least) if least == most else f"{least}–{most}"
        cpus += least * quantity(workload.container["resources"]["requests"]["cpu"])
        gibibytes += least * quantity(workload.container["resources"]["requests"]["memory"]) / 2**30
    shown = {name: pods for names, pods in rows.items() for name in re.findall("`(.+?)`", names)}
    assert shown == expected
    assert f"{cpus:g} CPUs and {gibibytes:g} GiB" in PAGE


def test_every_component_and_overlay_is_explained():
    """Each has a row in the page's tables, or, where it is a part of others, a sentence."""
    for directory in (*(K8S / "components").iterdir(), *(K8S / "overlays").iterdir()):
        assert f"`{directory.name}`" in PAGE, directory.name


def test_the_example_names_components():
    """The kustomization that the page shows is one, with `common` last."""
    (text,) = re.findall(r"((?:    .*\n)*    kind: Kustomization\n(?:    .*\n)*)", PAGE)
    shown: Any = yaml.safe_load(text)
    assert shown["components"][-1].endswith("/common")
    for path in (*shown["resources"], *shown["components"]):
        assert (K8S / "overlays" / "cpu" / path).resolve().is_dir()


def _make_secret(directory: Path) -> Any:
    """Run the commands that make the keys and the Secret, the image's `tercet` replaced by this environment's."""
    tercet = shlex.join([sys.executable, "-m", "tercet.cli"])
    version = next(iter(_ours())).split(":")[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for step in (SEARCH_KEY, CLIENT_KEY):
        in_image, command = f"docker run --rm tercet-tools:{version}", COMMANDS[step]
        assert command.startswith(f"{in_image} keys new ")
        subprocess.run(
            ["bash", "-c", command.replace(in_image, tercet)], check=True, cwd=directory, timeout=60, env=environment
        )
    dry = f"{COMMANDS[SECRET]} --dry-run=client --output=json"
    told = subprocess.run(["bash", "-c", dry], check=True, cwd=directory, timeout=60, capture_output=True, text=True)
    made = json.loads(told.stdout)
    made["stringData"] = {name: base64.b64decode(value).decode() for name, value in made["data"].items()}
    return made


def _wanted(secret: str, overlay: str = OVERLAY.name) -> set[str]:
    """Return the entries of *secret* that pods read."""
    return {entry for found, workload in each_workload() if found.name == overlay for entry in _read(workload, secret)}


def _read(workload: Workload, secret: str) -> set[str]:
    references = [entry.get("valueFrom", {}).get("secretKeyRef", {}) for entry in workload.container["env"]]
    volumes = [volume["secret"] for volume in workload.pod.get("volumes", []) if "secret" in volume]
    items = [item for volume in volumes if volume["secretName"] == secret for item in volume["items"]]
    return {item["key"] for item in items} | {item["key"] for item in references if item.get("name") == secret}


def _curl(command: str) -> dict[str, str]:
    """Return a curl command's URL, header and body."""
    words = shlex.split(command)
    assert words[0] == "curl"
    url = words[-1]
    return {"url": url, "header": words[words.index("-H") + 1], "body": words[words.index("--json") + 1]}
