"""What ships: a CrossEncoder directory with bf16 weights, without the word embeddings, which are the embedding model's."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder

from services.common.model_completion import COMPLETION_FILE, completed
from services.common.model_files import files_digest, resolve_model
from services.rerank.backends.late_interaction import FORM
from training.evaluate import Cascade
from training.model import WORD_EMBEDDINGS

MAX_BYTES = 25_000_000
CASCADE_FILE = "cascade.json"
CARD_FILE = "README.md"
_WHOLE = "model.safetensors"
# Another name: a library that knows nothing of completion must not load the weights that are here as the whole model.
_WEIGHTS = "weights.safetensors"


class CannotShip(Exception):
    """The student cannot be shipped as it is; the message says why."""


def write_shipped(student: CrossEncoder, embedding_model: str, place: Path) -> None:
    """
    Write what ships of *student* to *place*, which is replaced; the card and the cascade's constants come later.

    Raises:
        CannotShip: Its word embeddings are not those of *embedding_model*, or it is larger than `MAX_BYTES`.
    """
    made = place.with_name(f".making-{place.name}")
    shutil.rmtree(made, ignore_errors=True)
    student.save_pretrained(str(made), create_model_card=False)
    tensors = load_file(made / _WHOLE)
    embeddings = tensors.pop(WORD_EMBEDDINGS)
    theirs = load_file(resolve_model(embedding_model) / _WHOLE)[WORD_EMBEDDINGS]
    if not torch.equal(embeddings, theirs):
        raise CannotShip(f"the word embeddings are not those of {embedding_model}: were they trained?")
    halves = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, made / _WEIGHTS, metadata={"format": "pt"})
    (made / _WHOLE).unlink()
    (made / _WEIGHTS).chmod(0o644)  # It is written for its owner alone, and is to be read by the services' user.
    digest = hashlib.sha256(theirs.numpy().tobytes()).hexdigest()
    taken = {WORD_EMBEDDINGS: {"model": embedding_model, "tensor": WORD_EMBEDDINGS, "sha256": digest}}
    _write_json(made / COMPLETION_FILE, {"weights": _WEIGHTS, "whole": _WHOLE, "taken": taken})
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise CannotShip(f"it takes {size:,} bytes, more than {MAX_BYTES:,}")
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)


def load_shipped(place: Path, cache_dir: Path, *, device: str) -> CrossEncoder:
    """Load what `write_shipped` wrote, made whole in *cache_dir*, as any sentence-transformers model."""
    return CrossEncoder(str(completed(place, resolve_model, cache_dir=cache_dir)), device=device)


def write_cascade(place: Path, cascade: Cascade, *, first_stage: str, embedding_model: str) -> None:
    """
    Write the constants that make one probability of MaxSim and logit.

    *fingerprint* begins that of the first stage: another MaxSim, or one over another model's vectors, does not fit.
    """
    fingerprint = f"{FORM}:{files_digest(resolve_model(embedding_model))[:16]}"
    _write_json(place / CASCADE_FILE, {"first_stage": first_stage, "fingerprint": fingerprint, **asdict(cascade)})


def weights_digest(place: Path) -> str:
    """Return a SHA-256 of the weights that ship, which names everything that was measured with them."""
    return hashlib.sha256((place / _WEIGHTS).read_bytes()).hexdigest()


def _write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
