"""
Builds the images and runs them: `make image-check`. Prints what it did; the exit status is 1 at the first thing that is wrong.

The containers run as they should in production: the image's user, a read-only root, no capabilities. They share a network
namespace that has loopback and nothing else, so that a start which needs a model hub, or any network, fails here.

Needs podman 4 with crun, as root. Where no registry can be reached, `--base debian` makes a stand-in for the base image with
mmdebstrap. pip's configuration of this machine (`pip config list`) holds in the build too.
"""

import argparse
import configparser
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("embedding", "rerank", "search")
USER = "10001:10001"
STAND_IN = "localhost/python:3.11-slim-bookworm"
START_PATIENCE_S = 600.0
STOP_PATIENCE_S = 40.0
IN_A_NAMESPACE = "TERCET_IMAGE_CHECK"

DOCUMENTS = [
    {"id": "sun", "text": "The Sun is a star of the spectral class G at the centre of the solar system."},
    {"id": "bread", "text": "Sourdough bread rises with wild yeast and lactic acid bacteria."},
    {"id": "tax", "text": "A value-added tax is charged on the price of goods at each stage of production."},
    {"id": "piano", "text": "A piano has 88 keys; hammers strike its strings when they are pressed."},
]
QUESTION, ANSWER = "what makes dough rise", "bread"

# Run in a service's container.
VERSIONS = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
POST = (
    "import json, sys, urllib.request as u\n"
    "r = u.Request('http://127.0.0.1:8000' + sys.argv[1], sys.argv[2].encode(), {'content-type': 'application/json'})\n"
    "print(u.urlopen(r, timeout=60).read().decode())"
)


def say(line: str) -> None:
    """Print *line* at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def demand(condition: bool, complaint: str) -> None:
    """End the check with *complaint* unless *condition* holds."""
    if not condition:
        raise SystemExit(f"image-check: {complaint}")


class Podman:
    """An engine with a store of its own under *directory*, which is removed with it."""

    def __init__(self, directory: Path) -> None:
        self._options = ["--root", str(directory / "store"), "--runroot", str(directory / "run")]
        self._options += ["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "crun"]
        self._environment = {**os.environ, "TMPDIR": str(directory)}

    def __call__(self, *arguments: str, ok: Sequence[int] = (0,)) -> str:
        """Run a command and return what it printed. A status that is not in *ok* ends the check."""
        command = ["podman", *self._options, *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode not in ok:
            lines = (done.stdout + done.stderr).splitlines()[-40:]
            raise SystemExit(
                "\n".join([*lines, f"image-check: podman {' '.join(arguments[:3])} failed ({done.returncode})"])
            )
        return done.stdout.strip()

    def inspect(self, image: str) -> dict[str, Any]:
        """Return the image's configuration, with its size in bytes as `Size`."""
        found = json.loads(self("image", "inspect", image))[0]
        return {**found["Config"], "Healthcheck": found.get("Healthcheck"), "Size": found["Size"]}


def hardening() -> list[str]:
    """Return the options under which every container runs."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]
    # No systemd is here to run the health checks: we run their command.
    return [
        *limits, "--cgroups=disabled", "--no-healthcheck", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp",
        "--cap-drop=ALL", "--security-opt=no-new-privileges",
    ]  # fmt: skip


def pip_volumes(directory: Path) -> list[str]:
    """Return `--volume` options that give a build this machine's pip configuration, with the directories that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    options = {
        key.removeprefix("global.").removeprefix(":env:."): value.strip("'")
        for key, _, value in (line.partition("=") for line in listed.stdout.splitlines())
        if key.startswith(("global.", ":env:."))
    }
    parser = configparser.RawConfigParser()
    parser["global"] = {key: value.replace("\\n", "\n") for key, value in options.items()}
    with (directory / "pip.conf").open("w") as file:
        parser.write(file)
    places = {word.removeprefix("file://") for value in options.values() for word in re.split(r"\s+|\\n", value)}
    # The folder above an index on disk: its pages point to the files beside it.
    mounts = {
        str(Path(place).parent) if place.endswith("/simple") else place for place in places if Path(place).exists()
    }
    volumes = [f"{directory}/pip.conf:/etc/pip.conf:ro", *(f"{place}:{place}:ro" for place in sorted(mounts))]
    return [part for volume in volumes for part in ("--volume", volume)]


def make_stand_in(podman: Podman, directory: Path) -> None:
    """Make an image of Debian with its Python 3.11, which stands in for the official one of Python."""
    archive = directory / "debian.tar"
    packages = "python3,python3-venv,ca-certificates,netbase,tzdata"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", "bookworm", str(archive)], check=True
    )
    podman(
        "import",
        "--change",
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        str(archive),
        STAND_IN,
    )
    archive.unlink()


def build(podman: Podman, target: str, arguments: Sequence[str]) -> None:
    """Build the image of *target*."""
    began = time.monotonic()
    # Docker's format: OCI's own has no health check. Without layers: podman 4 loses the stages that `--mount` names.
    how = ["--isolation=chroot", "--layers=false", "--format=docker", "--target", target, "--tag", f"tercet-{target}"]
    podman("build", *how, *arguments, str(ROOT))
    say(f"{target}: built in {time.monotonic() - began:.0f} s")


def check_image(podman: Podman, target: str, base_bytes: int) -> None:
    """Look at what an image says of itself."""
    config = podman.inspect(f"tercet-{target}")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    demand(config["User"] == USER, f"{target} runs as {config['User']!r}")
    labels = config["Labels"]
    demand(labels["org.opencontainers.image.version"] == version, f"{target} says that it is of another version")
    demand(labels["org.opencontainers.image.title"] == f"tercet-{target}", f"{target} has another's title")
    size, own = config["Size"] / 1e6, (config["Size"] - base_bytes) / 1e6
    say(
        f"{target}: {size:.0f} MB, {own:.0f} MB of it over its base; user {config['User']}; {' '.join(config['Entrypoint'])}"
    )


def check_packages(podman: Podman, target: str) -> None:
    """Compare what is installed with constraints.txt, and see that what builds images is not in them."""
    said = podman(
        "run", "--rm", "--network=none", *hardening(), "--entrypoint", "python", f"tercet-{target}", "-c", VERSIONS
    )
    found = {re.sub(r"[-_.]+", "-", name).lower(): version.split("+")[0] for name, version in json.loads(said).items()}
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    found.pop("tercet")
    wrong = {name: version for name, version in found.items() if pinned.get(name) != version}
    demand(not wrong, f"{target} has packages that constraints.txt does not name: {wrong}")
    demand("pip" not in found, f"{target} has pip in it")
    demand(target != "search" or "torch" not in found, "the search image has torch in it")
    say(f"{target}: {len(found)} packages, each in the version of constraints.txt")


def wait_healthy(podman: Podman, target: str) -> float:
    """Run the image's own health check until it passes, and return how long that took in s."""
    command = podman.inspect(f"tercet-{target}")["Healthcheck"]["Test"]
    demand(command[0] == "CMD", f"{target}'s health check needs a shell")
    began = time.monotonic()
    while True:
        done = podman("exec", target, *command[1:], ok=(0, 1))
        if not done:
            return time.monotonic() - began
        if (
            podman("inspect", "--format", "{{.State.Running}}", target) != "true"
            or time.monotonic() - began > START_PATIENCE_S
        ):
            raise SystemExit(f"{podman('logs', target)}\nimage-check: {target} is not healthy: {done}")
        time.sleep(0.5)


def stop(podman: Podman, target: str) -> None:
    """Send SIGTERM to process 1 of a container, and see that it ends by itself and well."""
    began = time.monotonic()
    podman("kill", "--signal", "TERM", target)
    code = podman("wait", target)
    took_s = time.monotonic() - began
    demand(code == "0", f"{target} ended with status {code} after SIGTERM")
    demand(took_s < STOP_PATIENCE_S, f"{target} took {took_s:.0f} s to end")
    say(f"{target}: SIGTERM, exit status 0 after {took_s:.1f} s")


def check_refusal(podman: Podman) -> None:
    """An image started with no settings must not open its port to a network without saying so."""
    for target in SERVICES:
        said = podman("run", "--rm", "--network=none", *hardening(), f"tercet-{target}", ok=(2,))
        demand(not said, f"{target} says {said!r} when it must refuse to start")
    say("without keys, and without a word that none are wanted, no service starts (status 2)")


def check_search(podman: Podman) -> None:
    """Index a few documents by the tools image, ask a question, and hold the answer to what it must be."""
    lines = "".join(f"{json.dumps(document)}\n" for document in DOCUMENTS)
    shell = (
        f"cat > /tmp/documents.jsonl <<'END'\n{lines}END\nexec tercet index --collection default /tmp/documents.jsonl"
    )
    tools = ["run", "--rm", "--network", "container:embedding", *hardening()]
    podman(*tools, "--entrypoint", "sh", "tercet-tools", "-c", shell)
    body = json.dumps({"query": QUESTION, "k": 3, "timeout_ms": 30_000})
    answer = json.loads(podman("exec", "search", "python", "-c", POST, "/search", body))
    best = answer["hits"][0]
    demand(best["id"] == ANSWER, f"{QUESTION!r} is answered by {best}")
    demand(not answer["degraded"], f"the answer is degraded: {answer['degraded']}")
    demand("rerank" in best["stages"], f"nothing was reranked: {best}")
    say(f"indexed {len(DOCUMENTS)} documents by tercet-tools; {QUESTION!r} → {best['id']!r}, reranked, not degraded")


def check_containers(podman: Podman) -> None:
    """Run the three services beside each other, twice: the second start finds what the first one kept."""
    for start in ("first", "second"):
        for target in SERVICES:
            options = ["--name", target, "--network", "none" if target == "embedding" else "container:embedding"]
            options += [f"--volume={target}-{kind}:/var/{kind}/tercet" for kind in ("lib", "cache")]
            options += ["--env", f"{target.upper()}_ALLOW_OPEN_NETWORK=true"]
            podman("run", "--detach", *options, *hardening(), f"tercet-{target}")
            say(f"{target}: healthy {wait_healthy(podman, target):.1f} s after its {start} start")
        if start == "first":
            for target in SERVICES:
                demand(podman("exec", target, "id", "-u") == USER.split(":")[0], f"{target} runs as somebody else")
                podman("exec", target, "sh", "-c", "touch /opt/tercet/x /var/x 2>/dev/null", ok=(1,))
            check_search(podman)
        for target in reversed(SERVICES):
            stop(podman, target)
            podman("rm", target)


def in_a_namespace() -> None:
    """Start again with mounts of our own: crun wants one version of cgroups, where some machines have both mounted."""
    script = 'umount -R -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
    os.environ[IN_A_NAMESPACE] = "1"
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, *sys.argv])


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", help="the base image; `debian`: a stand-in made by mmdebstrap")
    parser.add_argument(
        "--torch-index-url", help="where the CPU variant's torch comes from; empty: where all else does"
    )
    parser.add_argument("--directory", type=Path, help="where there is room for images while it runs: some 10 GB")
    given = parser.parse_args()
    needed = ["podman", "crun", "unshare", *(["mmdebstrap"] if given.base == "debian" else [])]
    missing = [name for name in needed if shutil.which(name) is None]
    demand(not missing, f"needs {', '.join(missing)} (Debian: apt-get install podman crun mmdebstrap)")
    demand(os.geteuid() == 0, "needs root, for podman without systemd")
    if IN_A_NAMESPACE not in os.environ:
        in_a_namespace()
    directory = Path(tempfile.mkdtemp(prefix="tercet-images-", dir=given.directory))
    podman = Podman(directory)
    try:
        _check(podman, directory, given)
    finally:
        podman("rm", "--all", "--force", ok=(0, 1, 2, 125))
        podman("rmi", "--all", "--force", ok=(0, 1, 2, 125))
        if os.path.ismount(directory / "store" / "overlay"):
            subprocess.run(["umount", "--recursive", str(directory / "store" / "overlay")], check=True)
        shutil.rmtree(directory)
    say("image-check: all is as it should be")


def _check(podman: Podman, directory: Path, given: argparse.Namespace) -> None:
    arguments = pip_volumes(directory)
    base = given.base
    if base == "debian":
        make_stand_in(podman, directory)
        base = STAND_IN
    if base is not None:
        arguments += ["--build-arg", f"BASE={base}"]
    if given.torch_index_url is not None:
        arguments += ["--build-arg", f"TORCH_INDEX_URL={given.torch_index_url}"]
    for target in (*SERVICES, "tools"):
        build(podman, target, arguments)
        check_image(podman, target, podman.inspect(base)["Size"] if base is not None else 0)
        check_packages(podman, target)
    check_refusal(podman)
    check_containers(podman)


if __name__ == "__main__":
    main()
