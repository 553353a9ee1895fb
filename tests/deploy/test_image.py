"""The Dockerfile agrees with the repository, the settings and the packages. That it builds and runs: `make image-check`."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.images.requirements import layers
from services.common.settings import variable_names
from services.embedding.settings import EmbeddingSettings
from services.rerank.settings import RerankSettings
from services.search.settings import SearchSettings
from tests.deploy import dockerfile
from tests.deploy.dockerfile import IMAGES, ROOT
from tests.search_process import ServiceProcess

SERVICES = {"embedding": EmbeddingSettings, "rerank": RerankSettings, "search": SearchSettings}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Imported in functions of common modules that the search service does not call.
NOT_REACHED = {"search": {"huggingface_hub", "safetensors"}}


def plain(name: str) -> str:
    """Return a distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("source", sorted(set(dockerfile.from_context())))
def test_what_a_build_copies_is_there_and_not_ignored(source: str):
    """Each COPY and bind mount from the repository finds its source."""
    assert (ROOT / source).exists()
    assert not dockerfile.is_ignored(source)


OUTSIDE = (
    ".git/config",
    ".venv/bin/python",
    "deploy/compose/secrets/peer_key",
    "tests/conftest.py",
    "services/__pycache__/x.pyc",
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_gets_into_a_build(path: str):
    """Secrets, history, environments and tests stay out of the build's context."""
    assert dockerfile.is_ignored(path)


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_runs_as_a_user_without_rights(target: str):
    """The user is a number, so that `runAsNonRoot` can be checked without the image's list of users."""
    assert dockerfile.last(target, "USER").rest == "10001:10001"


@pytest.mark.parametrize("target", IMAGES)
def test_process_1_is_the_program_itself(target: str):
    """The entry point is in exec form and there, so SIGTERM reaches it and no shell."""
    words = dockerfile.last(target, "ENTRYPOINT").exec_form
    if target == "tools":
        assert words[0] in PYPROJECT["project"]["scripts"]
    else:
        assert words == ["python", "-m", f"services.{target}"]
        assert importlib.util.find_spec(f"services.{target}.__main__")


@pytest.mark.parametrize("target", SERVICES)
def test_the_variables_of_an_image_are_settings(target: str):
    """A variable with the service's prefix that is no setting would stop the start."""
    ours = {name for name in dockerfile.environment(target) if name.startswith(f"{target.upper()}_")}
    assert ours
    assert ours <= set(variable_names(SERVICES[target]))


@pytest.mark.parametrize("target", SERVICES)
def test_the_exposed_ports_are_those_of_the_settings(target: str):
    """EXPOSE names the default port of the service, and of a node where it can be one."""
    settings = SERVICES[target]
    ports = {settings.model_fields["listen_port"].default}
    if target == "search":
        ports.add(settings(role="shard", ledger_url="postgresql://ledger/tercet").listen_port)
    assert {int(word) for word in dockerfile.last(target, "EXPOSE").words} == ports


def test_the_label_is_the_packages_version():
    """An image built by hand says the right version too."""
    versions = [item.rest for item in dockerfile.read_stages()[0] if item.rest.startswith("VERSION=")]
    assert versions == [f"VERSION={PYPROJECT['project']['version']}"]


def test_packages_come_in_the_versions_of_the_constraints():
    """Every installation names constraints.txt, or our own wheel without its dependencies."""
    runs = [item.rest for target in IMAGES for item in dockerfile.of_image(target) if "pip" in item.rest]
    runs += [item.rest for item in dockerfile.read_stages()[1]["builder"].instructions if "pip" in item.rest]
    commands = [command for run in runs for command in re.findall(r"pip [^&;]*\binstall\b[^&;]*", run)]
    assert len(commands) > 5
    for command in commands:
        assert "-c /constraints.txt" in command or "-c constraints.txt" in command or "--no-deps /wheel" in command


def test_what_images_install_is_pinned():
    """Each name in the images' lists is a dependency or of an extra of the project, and in constraints.txt."""
    pinned = {plain(name) for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)}
    project = PYPROJECT["project"]
    known = {
        plain(Requirement(text).name) for text in [*project["dependencies"], *project["optional-dependencies"]["otel"]]
    }
    for name, requirements in layers(PYPROJECT).items():
        names = {plain(Requirement(text).name) for text in requirements}
        assert names <= pinned
        assert name == "tools" or names <= known


def imports_of(module: str) -> set[str]:
    """Return the third-party modules that *module* imports, itself or by modules of ours, in functions too."""
    todo, seen, found = [module], set(), set()
    while todo:
        name = todo.pop()
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        file = file if file.is_file() else ROOT.joinpath(*name.split("."), "__init__.py")
        if name in seen or not file.is_file():
            continue
        seen.add(name)
        todo.append(name.rpartition(".")[0] or name)
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            todo += [name for name in names if name.startswith("services")]
            found |= {name.partition(".")[0] for name in names}
    return {name for name in found if name not in sys.stdlib_module_names and name not in ("services", "tercet")}


def with_their_own(requirements: list[str]) -> set[str]:
    """Return the distributions that *requirements* bring, by the metadata of those installed here."""
    todo = [(Requirement(text).name, tuple(Requirement(text).extras)) for text in requirements]
    found: set[tuple[str, tuple[str, ...]]] = set()
    while todo:
        name, extras = todo.pop()
        if (plain(name), extras) in found:
            continue
        found.add((plain(name), extras))
        for text in requires(name) or []:
            needed = Requirement(text)
            if any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((needed.name, tuple(needed.extras)))
    return {name for name, _ in found}


@pytest.mark.parametrize(("target", "group"), [("embedding", "models"), ("rerank", "models"), ("search", "search")])
def test_an_image_has_what_its_service_imports(target: str, group: str):
    """The packages of each image are enough for all that its service may import; search needs no model library."""
    there = with_their_own(layers(PYPROJECT)[group])
    providers = packages_distributions()
    needed = imports_of(f"services.{target}.__main__") - NOT_REACHED.get(target, set())
    missing = {name for name in needed if not {plain(by) for by in providers[name]} & there}
    assert not missing
    assert ("torch" in there) == (target != "search")


@pytest.mark.parametrize("target", SERVICES)
def test_the_health_check_asks_the_running_service(target: str, tmp_path: Path):
    """The image's command passes once the service is ready, and fails before it has started and after it has stopped."""
    port_file = tmp_path / "port"
    given = dockerfile.health_command(target)
    assert given[-1] == dockerfile.environment(target)[f"{target.upper()}_PORT_FILE"]
    command = [sys.executable, *given[1:-1], str(port_file)]
    more = {"SEARCH_DATA_DIR": str(tmp_path / "data")} if target == "search" else {f"{target.upper()}_MODEL": "fake"}
    service = ServiceProcess(target, tmp_path / "log", **{f"{target.upper()}_PORT_FILE": str(port_file), **more})

    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    service.start()
    passed = subprocess.run(command, capture_output=True, text=True, check=False)
    service.stop()

    assert (passed.returncode, passed.stdout) == (0, "")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
