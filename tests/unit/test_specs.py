"""How models are named to the service: `[alias=]name[@revision][;key=value]…`."""

import pytest

from services.embedding.settings import EmbeddingSettings
from services.embedding.specs import SpecError, parse_spec, parse_specs


def test_a_name_alone():
    """The usual case: a name is what callers use, too."""
    spec = parse_spec("BAAI/bge-small-en-v1.5")
    assert (spec.name, spec.public_name, spec.short_name) == (
        "BAAI/bge-small-en-v1.5",
        "BAAI/bge-small-en-v1.5",
        "bge-small-en-v1.5",
    )
    assert (spec.alias, spec.revision, spec.options, spec.pinned) == (None, None, {}, False)


def test_everything_at_once():
    """Alias, revision and options of one model."""
    spec = parse_spec("small=BAAI/bge-small-en-v1.5@5c38ec7; precision=fp32 ;pooling=cls;pinned=true;dimensions=any")
    assert (spec.public_name, spec.name, spec.revision) == ("small", "BAAI/bge-small-en-v1.5", "5c38ec7")
    assert spec.options == {"precision": "fp32", "pooling": "cls", "pinned": "true", "dimensions": "any"}
    assert spec.pinned
    assert spec.any_dimensions


def test_several_with_commas():
    """A comma separates models; a comma at the end is nothing."""
    assert [spec.public_name for spec in parse_specs("fake, b=fake,")] == ["fake", "b"]


def test_a_directory_may_have_an_at_sign(tmp_path):
    """What is a directory here is taken as it is."""
    directory = tmp_path / "model@2"
    directory.mkdir()
    assert (parse_spec(str(directory)).name, parse_spec(str(directory)).revision) == (str(directory), None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no model"),
        (" , ", "no model"),
        ("fake,fake", "named twice"),
        ("a=fake,a=other", "named twice"),
        ("fake@", "no revision"),
        ("fake;colour=red", "precision"),
        ("fake;precision", "precision"),
        ("fake;precision=fp8", "fp16"),
        ("fake;pooling=sum", "lasttoken"),
        ("fake;max_tokens=0", "positive"),
        ("fake;max_tokens=many", "positive"),
        ("fake;pinned=yes", "true"),
    ],
)
def test_what_cannot_be_read_is_said(text, says):
    """The error says which part is wrong, or what it may be; as a setting it stops the start."""
    with pytest.raises(SpecError, match=says):
        parse_specs(text)
    with pytest.raises(ValueError):
        EmbeddingSettings(model=text)
