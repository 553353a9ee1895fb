"""What training starts from: the reranker of the package, one that was trained before, or an embedding model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tercet
from services.common.model_completion import COMPLETION_FILE
from services.common.model_files import files_digest, resolve_model
from training.data import DataError
from training.recipe import EMBEDDING_MODEL, Recipe

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

PACKAGED = "tercet-reranker"


@dataclass(frozen=True, slots=True)
class Start:
    """
    A model to train further, or an embedding model to begin with.

    *embedding_model* gives the word embeddings, and the token vectors that the first stage compares; *directory* has
    the whole model.
    """

    name: str
    directory: Path
    embedding_model: str
    is_reranker: bool

    @property
    def first_stage(self) -> str:
        """The first stage that the reranker is made for, as the rerank service's settings name it."""
        return f"late-interaction/{self.embedding_model}"

    @property
    def first_stage_name(self) -> str:
        """What the first stage calls itself: of a path or a hub id the last part."""
        return f"late-interaction/{self.embedding_model.rstrip('/').rsplit('/', 1)[-1]}"

    @property
    def digest(self) -> str:
        """A checksum of the model's files."""
        return files_digest(self.directory)

    @property
    def most_tokens(self) -> int:
        """How many tokens the model has places for."""
        try:
            return int(json.loads((self.directory / "config.json").read_text())["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError):
            return Recipe().max_tokens

    def student(self, recipe: Recipe, device: str) -> "CrossEncoder":
        """
        Return the student to train.

        Raises:
            DataError: The model is of another kind.
        """
        # Imported here: torch takes seconds that a wrong name does not need.
        from training.model import UnknownStudent, continued_student, new_student

        try:
            if self.is_reranker:
                return continued_student(self.directory, max_tokens=recipe.max_tokens, device=device)
            return new_student(self.directory, max_tokens=recipe.max_tokens, seed=recipe.seed, device=device)
        except UnknownStudent as error:
            raise DataError(f"cannot train further: {error}") from error


def default_start() -> str:
    """Return the name of the packaged reranker, or of the packaged embedding model where the package has none."""
    return PACKAGED if (Path(tercet.__file__).parent / "models" / "reranker").is_dir() else EMBEDDING_MODEL


def open_start(name: str) -> Start:
    """
    Find the model *name*: a packaged one, or a directory.

    Raises:
        DataError: It is neither a reranker that was trained here nor an embedding model.
        ModelNotFound: There is no such model.
    """
    directory = resolve_model(name)
    try:
        modules = [module["type"].rsplit(".", 1)[-1] for module in json.loads((directory / "modules.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name} cannot be trained further: what works is {PACKAGED}, a directory that this command wrote, or an"
            " embedding model of sentence-transformers"
        ) from error
    if "Dense" not in modules:
        return Start(name, directory, name, is_reranker=False)
    return Start(name, directory, _embedding_model(Path(name)), is_reranker=True)


def _embedding_model(given: Path) -> str:
    """Return the model that the reranker *given* takes its word embeddings from."""
    file = given.expanduser() / COMPLETION_FILE
    if not file.is_file():
        return EMBEDDING_MODEL
    return str(next(iter(json.loads(file.read_text())["taken"].values()))["model"])
