"""Models that ship without the weights that another model has: made whole once, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder

from services.common.model_completion import COMPLETION_FILE, completed
from services.common.model_errors import InvalidModel, ModelNotFound
from services.common.model_files import check_model_files, resolve_model
from tests.tiny_models import write_bert
from training.model import WORD_EMBEDDINGS, new_student
from training.ship import CannotShip, load_shipped, write_shipped

PAIRS = [("river stone", "the river of stone."), ("glass", "an engine"), ("winter", "music after winter")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedding model that the word embeddings are taken from."""
    return write_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def student(model) -> CrossEncoder:
    """A student as it may come out of training: its weights are other than the embedding model's."""
    made = new_student(model, max_tokens=48, seed=1, device="cpu")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.endswith(WORD_EMBEDDINGS):
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return made


@pytest.fixture
def shipped(student, model, tmp_path, monkeypatch) -> Path:
    """What ships of it; what `resolve_model` makes whole goes to this test's directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = tmp_path / "shipped"
    write_shipped(student, str(model), place)
    return place


def test_what_ships_lacks_the_word_embeddings_and_scores_the_same(student, shipped, tmp_path):
    """The weights that ship are half as wide and fewer; made whole they score as the student does, within bf16."""
    tensors = load_file(shipped / "weights.safetensors")
    assert WORD_EMBEDDINGS not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    whole = load_shipped(shipped, tmp_path / "cache", device="cpu")
    made = load_file(completed(shipped, resolve_model, cache_dir=tmp_path / "cache") / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    assert all(torch.equal(made[name], tensor.float()) for name, tensor in tensors.items())
    assert whole.predict(PAIRS) == pytest.approx(student.predict(PAIRS), abs=0.01)


def test_any_name_of_it_gives_the_whole_model(shipped, tmp_path):
    """`resolve_model` makes it whole in the models' cache, and what it returns is a plain model directory."""
    place = resolve_model(str(shipped))
    assert place.is_relative_to(tmp_path / "home" / "tercet" / "models")
    check_model_files(place)
    assert not (place / COMPLETION_FILE).exists()
    direct = CrossEncoder(str(place), device="cpu").predict(PAIRS)
    assert np.array_equal(direct, load_shipped(shipped, tmp_path / "cache", device="cpu").predict(PAIRS))


def test_it_is_made_once(shipped, tmp_path):
    """A second call makes nothing; a directory that lost a file is made again; other weights have another place."""
    cache = tmp_path / "cache"
    place = completed(shipped, resolve_model, cache_dir=cache)
    written = (place / "model.safetensors").stat().st_mtime_ns
    assert completed(shipped, resolve_model, cache_dir=cache) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == written
    (place / "tokenizer.json").unlink()
    assert completed(shipped, resolve_model, cache_dir=cache) == place
    assert (place / "tokenizer.json").is_file()
    assert [file.name for file in place.parent.iterdir()] == [place.name]
    tensors = load_file(shipped / "weights.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shipped / "weights.safetensors")
    assert completed(shipped, resolve_model, cache_dir=cache) != place


def test_a_cache_that_cannot_be_written_to_costs_a_copy(shipped, tmp_path):
    """The model is made whole in a directory of this process's own."""
    (tmp_path / "file").write_text("no directory")
    place = completed(shipped, resolve_model, cache_dir=tmp_path / "file")
    assert CrossEncoder(str(place), device="cpu").predict(PAIRS).shape == (3,)


def test_a_complete_model_stays_where_it_is(model, tmp_path):
    """A directory that lacks nothing is returned as it is."""
    assert completed(model, resolve_model, cache_dir=tmp_path) == model
    assert resolve_model(str(model)) == model


def test_another_embedding_model_is_refused(shipped, tmp_path):
    """Word embeddings that are not those it was trained with make another model: an error, never wrong scores."""
    plan = json.loads((shipped / COMPLETION_FILE).read_text())
    plan["taken"][WORD_EMBEDDINGS]["model"] = str(write_bert(tmp_path / "other", seed=9))
    (shipped / COMPLETION_FILE).write_text(json.dumps(plan))
    with pytest.raises(InvalidModel, match="is not what"):
        completed(shipped, resolve_model, cache_dir=tmp_path / "cache")
    plan["taken"][WORD_EMBEDDINGS]["model"] = "./nowhere"
    (shipped / COMPLETION_FILE).write_text(json.dumps(plan))
    with pytest.raises(ModelNotFound, match="nowhere"):
        completed(shipped, resolve_model, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"weights": "w", "whole": "m", "taken": {"a": 1}}'])
def test_a_damaged_plan_is_named(shipped, tmp_path, content):
    """The message names the file."""
    (shipped / COMPLETION_FILE).write_bytes(content)
    with pytest.raises(InvalidModel, match=COMPLETION_FILE):
        completed(shipped, resolve_model, cache_dir=tmp_path / "cache")


def test_damaged_weights_are_named_and_leave_nothing(shipped, tmp_path):
    """Weights that are cut short or gone make no model."""
    file = shipped / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InvalidModel, match="weights"):
        completed(shipped, resolve_model, cache_dir=tmp_path / "cache")
    file.unlink()
    with pytest.raises(InvalidModel, match="weights"):
        completed(shipped, resolve_model, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_trained_word_embeddings_cannot_ship(model, tmp_path):
    """A student whose word embeddings changed would not be itself once made whole."""
    other = new_student(model, max_tokens=48, seed=1, device="cpu")
    with torch.no_grad():
        dict(other.named_parameters())[f"0.model.{WORD_EMBEDDINGS}"].add_(1.0)
    with pytest.raises(CannotShip, match="word embeddings"):
        write_shipped(other, str(model), tmp_path / "shipped")
