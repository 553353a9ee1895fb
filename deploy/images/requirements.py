"""
Writes what each image installs into a directory: `python3 requirements.py pyproject.toml OUT`, one file per image layer.

The lists are the `[dependency-groups]` of pyproject.toml (PEP 735), names only: constraints.txt has the versions. A file of
its own per layer keeps a layer as it is while something else in pyproject.toml changes.
"""

import sys
import tomllib
from pathlib import Path
from typing import Any


def group(groups: dict[str, Any], name: str) -> list[str]:
    """Return the requirements of the dependency group *name*, those of the groups that it includes first."""
    found: list[str] = []
    for item in groups[name]:
        for requirement in group(groups, item["include-group"]) if isinstance(item, dict) else [item]:
            if requirement not in found:
                found.append(requirement)
    return found


def layers(pyproject: dict[str, Any]) -> dict[str, list[str]]:
    """Return the requirements of each image layer; `tools` has all that the project needs, and every command's extra."""
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    listed = {name: group(pyproject["dependency-groups"], name) for name in pyproject["dependency-groups"]}
    return {**listed, "tools": [*project["dependencies"], *extras["export"], *extras["otel"]]}


def main(source: str, directory: str) -> None:
    """Write the lists of *source*, a pyproject.toml, into *directory*."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    for name, requirements in layers(tomllib.loads(Path(source).read_text())).items():
        (target / f"{name}.txt").write_text("".join(f"{requirement}\n" for requirement in requirements))


if __name__ == "__main__":
    main(*sys.argv[1:])
