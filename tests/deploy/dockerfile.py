"""Reads the Dockerfile and .dockerignore, as far as ours go."""

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("embedding", "rerank", "search", "tools")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined: `RUN`, and what comes after it."""

    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """What comes after the name, split as a shell does."""
        return shlex.split(self.rest)

    @property
    def exec_form(self) -> list[str]:
        """The words of a command that no shell reads."""
        words = json.loads(self.rest)
        assert isinstance(words, list)
        return words


@dataclass
class Stage:
    """A stage: what it is made from, and its own instructions."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def read_stages() -> tuple[list[Instruction], dict[str, Stage]]:
    """Return the instructions before the first stage, and the stages by name."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    before: list[Instruction] = []
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        instruction = Instruction(name, rest.strip())
        if name == "FROM":
            base, _, stage = instruction.words
            stages[stage] = Stage(stage, base)
        else:
            (list(stages.values())[-1].instructions if stages else before).append(instruction)
    return before, stages


def of_image(target: str) -> list[Instruction]:
    """Return all instructions that make the image *target*, those of the stages that it is made from first."""
    stages = read_stages()[1]
    found: list[Instruction] = []
    name = target
    while name in stages:
        found = [*stages[name].instructions, *found]
        name = stages[name].base
    return found


def environment(target: str) -> dict[str, str]:
    """Return the variables that the image *target* sets."""
    pairs = [word.partition("=") for item in of_image(target) if item.name == "ENV" for word in item.words]
    return {key: value for key, _, value in pairs}


def last(target: str, name: str) -> Instruction:
    """Return the instruction *name* that holds for the image *target*."""
    return next(item for item in reversed(of_image(target)) if item.name == name)


def health_command(target: str) -> list[str]:
    """Return the words of the image's health check."""
    return list(json.loads(last(target, "HEALTHCHECK").rest.partition("CMD ")[2]))


def from_context() -> list[str]:
    """Return the paths that a build takes from the repository, by COPY or by a bind mount."""
    sources = []
    for stage in read_stages()[1].values():
        for item in stage.instructions:
            if item.name == "COPY" and "--from" not in item.rest:
                sources += [word for word in item.words[:-1] if not word.startswith("--")]
            for mount in re.findall(r"--mount=(type=bind\S+)", item.rest):
                options = dict(option.partition("=")[::2] for option in mount.split(","))
                if "from" not in options:
                    sources.append(options["source"])
    return sources


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps *path* out of builds: the last pattern that fits it, or a folder above it, decides."""
    ignored = False
    parts = path.rstrip("/").split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        wanted = pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        if any(_fits(pattern, place) for place in above):
            ignored = not wanted
    return ignored


def _fits(pattern: str, path: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern.removeprefix("**/"))
    return pattern.count("/") == path.count("/") and fnmatch.fnmatchcase(path, pattern)
