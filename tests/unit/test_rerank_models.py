"""Which backends a model's name gets, and the constants that blend two of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.common.model_errors import InvalidModel, ModelNotFound
from services.common.settings import read_settings
from services.rerank.backends.fake import FakeBackend
from services.rerank.cascade import FittedBlend
from services.rerank.models import BLEND_FILE, check_cascade, first_stage, load_backends, load_blend
from services.rerank.settings import RerankSettings
from tests.rerank_backends import LabellingScorer

FIRST = FakeBackend().info
CONSTANTS: dict[str, Any] = {
    "first_stage": FIRST.name,
    "fingerprint": "fake-rerank",
    "both": [1.0, 2.0, -3],
    "first": [4.0, 5.0],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def blend(model: Path, content: str | dict[str, Any] | None) -> FittedBlend | None:
    """Return what is read where the model came with *content*."""
    if content is not None:
        (model / BLEND_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return load_blend(RerankSettings(model=str(model)), FIRST)


def test_one_scorer_or_two():
    """The model alone, or after the first stage; both read as many tokens as is set."""
    assert [one.info.name for one in load_backends(RerankSettings(model="fake"))] == ["fake"]
    two = load_backends(RerankSettings(model="fake", first_stage="fake", max_tokens=64))
    assert [one.info.max_tokens for one in two] == [64, 64]


def test_no_such_model(tmp_path):
    """Whichever of the two it is."""
    for settings in ({"model": str(tmp_path / "none")}, {"model": "fake", "first_stage": str(tmp_path / "none")}):
        with pytest.raises(ModelNotFound):
            load_backends(RerankSettings(**settings))


def test_a_classifier_in_a_cascade():
    """One whose labels say nothing about relevance stops the start, with what works; alone it serves classification."""
    labels = LabellingScorer("red", "green", "blue").info
    check_cascade([labels])
    check_cascade([FIRST, FIRST])
    with pytest.raises(InvalidModel, match=r"3 labels.*decoder"):
        check_cascade([FIRST, labels])


def test_constants_of_a_model(model):
    """They are read where they were fitted for the weights of this first stage, however it reads with them."""
    assert blend(model, CONSTANTS) == FittedBlend((1.0, 2.0, -3.0), (4.0, 5.0))


def test_the_first_stage_that_a_model_was_fitted_with(model):
    """It is taken where the package has it; other models stand alone, and what is set goes before."""
    packaged = "late-interaction/all-MiniLM-L6-v2"
    for fitted_with, expected in ((packaged, packaged), ("late-interaction/another", ""), ("fake", "")):
        (model / BLEND_FILE).write_text(json.dumps(CONSTANTS | {"first_stage": fitted_with}))
        assert first_stage(RerankSettings(model=str(model))) == expected
        assert first_stage(RerankSettings(model=str(model), first_stage="none")) == ""
        assert first_stage(RerankSettings(model=str(model), first_stage="fake")) == "fake"
    (model / BLEND_FILE).unlink()
    assert first_stage(RerankSettings(model=str(model))) == ""
    assert first_stage(RerankSettings(model="fake")) == ""


def test_the_first_stage_can_be_turned_off_by_a_variable(monkeypatch):
    """Of the packaged model, too, which has one; an empty variable leaves the default."""
    for given, expected in (("none", ""), ("", "late-interaction/all-MiniLM-L6-v2")):
        monkeypatch.setenv("RERANK_FIRST_STAGE", given)
        assert first_stage(read_settings(RerankSettings, os.environ)) == expected


def test_no_constants_for_this_cascade(model):
    """None came with the model, or they are for another first stage, or other weights of it: the neutral order is used."""
    assert blend(model, None) is None
    for other in ({"first_stage": "late-interaction/other"}, {"fingerprint": "other"}, {"fingerprint": None}):
        assert blend(model, CONSTANTS | other) is None
    assert load_blend(RerankSettings(model="fake"), FIRST) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        CONSTANTS | {"both": [1, 2]},
        CONSTANTS | {"first": [1, "2"]},
        CONSTANTS | {"first": None},
        json.dumps(CONSTANTS).replace("-3", "NaN"),
    ],
)
def test_damaged_constants_stop_the_start(model, content):
    """The message names the file."""
    with pytest.raises(InvalidModel, match=BLEND_FILE):
        blend(model, content)
