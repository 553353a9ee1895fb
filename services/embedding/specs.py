"""What the operator writes about each model: `[alias=]name[@revision][;key=value]…`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEYS = ("device", "dimensions", "max_tokens", "pinned", "pooling", "precision", "projection", "runtime")
POOLINGS = ("cls", "mean", "lasttoken", "weightedmean", "max")
_CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps", "cpu+cuda"),
    "dimensions": ("any", "declared"),
    "pinned": ("true", "false"),
    "pooling": POOLINGS,
    "precision": ("auto", "fp32", "bf16", "fp16", "int8"),
    "runtime": ("auto", "torch", "openvino"),
}
_ALIAS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


class SpecError(ValueError):
    """A model's specification cannot be read; the message says which part, and what it may be."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve. *options* hold what was said of it alone; everything else is as the settings say."""

    name: str
    alias: str | None = None
    revision: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        """What callers know it by."""
        return self.alias or self.name

    @property
    def short_name(self) -> str:
        """The part after the last slash."""
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    @property
    def pinned(self) -> bool:
        """Whether it is loaded at the start and stays."""
        return self.options.get("pinned") == "true"

    @property
    def any_dimensions(self) -> bool:
        """Whether vectors may be cut to any size, whatever the model declares."""
        return self.options.get("dimensions") == "any"


def parse_specs(text: str) -> list[ModelSpec]:
    """
    Read one specification or several, separated by commas.

    Raises:
        SpecError: One cannot be read, or two have the same name.
    """
    specs = [parse_spec(part) for part in text.split(",") if part.strip()]
    if not specs:
        raise SpecError("no model is named")
    names = [spec.public_name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"{name} is named twice; give one of them an alias: other-name={name}")
    return specs


def parse_spec(text: str) -> ModelSpec:
    """Read one specification. Raises SpecError."""
    head, *pairs = (part.strip() for part in text.split(";"))
    found = _ALIAS.fullmatch(head)
    alias, name = (found[1], found[2]) if found else (None, head)
    revision = None
    if "@" in name and not Path(name).expanduser().is_dir():
        name, _, revision = name.rpartition("@")
    if not name or revision == "":
        raise SpecError(f"{text!r} names no model, or no revision after the @")
    return ModelSpec(name, alias, revision, _options(pairs, text))


def _options(pairs: Sequence[str], text: str) -> dict[str, str]:
    options = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in KEYS or not equals or not value:
            raise SpecError(f"{pair!r} in {text!r}: after a semicolon comes one of {', '.join(KEYS)}, = and a value")
        if key == "max_tokens" and not (value.isdecimal() and int(value) > 0):
            raise SpecError(f"max_tokens in {text!r} must be a positive whole number, not {value!r}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise SpecError(f"{key} in {text!r} must be one of {', '.join(_CHOICES[key])}, not {value!r}")
        options[key] = value
    return options
