"""compose.yaml as Docker's compose reads it, as far as ours goes: defaults of variables, files of them, files laid over it."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from services.common.settings import ServiceSettings, read_settings
from services.embedding.settings import EmbeddingSettings
from services.rerank.settings import RerankSettings
from services.search.settings import SearchSettings
from tests.deploy import dockerfile
from tests.deploy.dockerfile import ROOT

SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "embedding": EmbeddingSettings,
    "rerank": RerankSettings,
    "search": SearchSettings,
}
SECRETS = "deploy/compose/secrets/"


@dataclass(frozen=True)
class Service:
    """A service of the file; *directory* holds the secrets that its variables and files come from."""

    name: str
    spec: dict[str, Any]
    directory: Path

    @property
    def target(self) -> str:
        """The image of ours that it runs; empty for somebody else's."""
        return str(self.spec.get("build", {}).get("target", ""))

    @property
    def profiles(self) -> set[str]:
        """The profiles that start it; none: always."""
        return set(self.spec.get("profiles", []))

    @property
    def networks(self) -> dict[str, set[str]]:
        """The networks that it is on, with the names that it has there besides its own."""
        given = self.spec["networks"]
        return {name: set((given[name] or {}).get("aliases", []) if isinstance(given, dict) else []) for name in given}

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables of its process: the image's, those of its files, and its own, each over those before."""
        found = dockerfile.environment(self.target) if self.target else {}
        for path in self.spec.get("env_file", []):
            lines = (self.directory / path.removeprefix(SECRETS)).read_text().splitlines()
            found.update(line.partition("=")[::2] for line in lines)
        return {**found, **self.spec.get("environment", {})}

    def settings(self, monkeypatch: Any) -> ServiceSettings:
        """Return its settings as the service reads them. Raises SettingsError where it would not start."""
        with monkeypatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            own = {name: value for name, value in self.environment.items() if name != "PATH"}
            return read_settings(SETTINGS[self.target], own)


def make_secrets(directory: Path) -> Path:
    """Run secrets.sh in *directory* and return where it has put what it made."""
    script = directory / "secrets.sh"
    script.write_bytes((ROOT / "deploy/compose/secrets.sh").read_bytes())
    subprocess.run(["sh", str(script)], check=True)
    return directory / "secrets"


@cache
def read(*paths: str) -> dict[str, Any]:
    """Return the compose files *paths*, laid one over another, with each variable at its default."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _over(merged, _defaults(yaml.safe_load((ROOT / path).read_text())))
    return merged


def services(directory: Path, *paths: str) -> dict[str, Service]:
    """Return the services of the compose files *paths* by name; *directory* has the secrets."""
    found = read(*(paths or ("compose.yaml",)))["services"]
    return {name: Service(name, spec, directory) for name, spec in found.items()}


def seconds(duration: str) -> float:
    """Return a duration such as `1m30s` in seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration)))


def published(service: Service) -> Iterator[tuple[str, int, int]]:
    """Yield the address, the port there and the port of the container for each port that *service* publishes."""
    for text in service.spec.get("ports", []):
        address, outside, inside = text.split(":")
        yield address, int(outside), int(inside)


def _defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defaults(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_defaults(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    return value


def _over(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {
            key: _over(below[key], above[key]) if key in below and key in above else {**below, **above}[key]
            for key in {**below, **above}
        }
    if isinstance(below, list) and isinstance(above, list):
        return [*below, *above]
    return above
