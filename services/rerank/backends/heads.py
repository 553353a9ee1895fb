"""Which kind of scorer a model's configuration says it is, read without loading it."""

import json
from pathlib import Path
from typing import Any, Literal

from services.common.model_errors import InvalidModel, ModelNotFound
from services.common.model_files import check_model_files, resolve_model

Head = Literal["scores", "words"]

WORKING = (
    "a sentence-transformers CrossEncoder, a model with a sequence-classification head of one label or several, or a "
    "causal model of the Qwen3-Reranker form, which says yes or no, works here"
)


def head_of(name: str, *, revision: str | None = None) -> Head:
    """
    Return what the model *name* has for a head: one that gives scores, or words whose logits are the score.

    Raises:
        ModelNotFound: There is no such model, or it has another head; the message says which kinds work.
        InvalidModel: A file of it is missing or damaged.
    """
    directory = resolve_model(name, revision=revision)
    check_model_files(directory)
    if (directory / "modules.json").is_file():
        kind = _library_class(directory)
        if kind != "CrossEncoder":
            raise ModelNotFound(
                f"{name} cannot score pairs: it is a {kind}, which makes vectors of texts (the model name "
                f"late-interaction/{name} scores by those); {WORKING}"
            )
        modules = {str(module.get("type", "")).rsplit(".", 1)[-1] for module in _json(directory / "modules.json")}
        return "words" if "LogitScore" in modules else "scores"
    architectures = _json(directory / "config.json").get("architectures") or ["of an unknown architecture"]
    if any(str(one).endswith("ForSequenceClassification") for one in architectures):
        return "scores"
    if any(str(one).endswith("ForCausalLM") for one in architectures):
        return "words"
    raise ModelNotFound(f"{name} cannot score pairs: it is {', '.join(map(str, architectures))}; {WORKING}")


def _library_class(directory: Path) -> str:
    """Return the class of sentence-transformers that the model was saved from; old encoders do not say."""
    file = directory / "config_sentence_transformers.json"
    return str(_json(file).get("model_type", "SentenceTransformer")) if file.is_file() else "SentenceTransformer"


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{file} cannot be read: {error}") from error
