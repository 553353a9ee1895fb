"""What a model is, kept as JSON so that later starts need not load the model to know it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from services.common.encoders.projection import Projection
from services.common.model_files import code_digest


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """
    A model and the options that change its vectors.

    *files_digest* is the SHA-256 of its files; *variant* says what was asked for beside them (`+cls`,
    `+pca128-1a2b3c4d`), empty by default; *digest* is a SHA-256 of both. *dim* is the width of pooled vectors,
    *token_dim* that of token vectors. *dimensions* are the sizes the model declares that vectors may be cut to
    (Matryoshka), smallest first. *pooling* is the mode, several joined by `+`. *weights_bytes* counts 4 bytes a
    parameter. *default_prompt* is the name of the prompt that the model wants where none is asked for;
    *pools_prompt* is false for models that leave the prompt's tokens out of pooling.
    """

    name: str
    directory: Path
    files_digest: str
    variant: str
    digest: str
    dim: int
    token_dim: int
    max_tokens: int
    prompts: Mapping[str, str]
    default_prompt: str | None
    pools_prompt: bool
    pooling: str
    dimensions: tuple[int, ...]
    vocabulary_size: int
    pad_id: int
    weights_bytes: int
    model_type: str
    similarity: str

    def to_json(self) -> str:
        """Return all but the name and the directory, which are the caller's."""
        values = asdict(self)
        del values["name"], values["directory"]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, name: str, directory: Path) -> "ModelDescription":
        """
        Return what `to_json` wrote.

        Raises:
            ValueError: It was not written by this version's `to_json`, or is damaged.
        """
        values = json.loads(text)
        expected = {field.name for field in fields(cls)} - {"name", "directory"}
        if not isinstance(values, dict) or set(values) != expected:
            raise ValueError("no model description")
        values["dimensions"] = tuple(int(size) for size in values["dimensions"])
        numbers = ("dim", "token_dim", "max_tokens", "vocabulary_size", "pad_id", "weights_bytes")
        if not all(type(values[key]) is int for key in numbers) or not isinstance(values["prompts"], dict):
            raise ValueError("no model description")
        return cls(name=name, directory=directory, **values)


def variant_of(directory: Path, *, pooling: str | None, projection: Projection | None, trust_remote_code: bool) -> str:
    """Return what changes a model's vectors beside its files, as a suffix to a fingerprint; empty by default."""
    code = code_digest(directory) if trust_remote_code else None
    parts = (pooling, projection.name if projection else None, f"code-{code[:8]}" if code else None)
    return "".join(f"+{part}" for part in parts if part)
