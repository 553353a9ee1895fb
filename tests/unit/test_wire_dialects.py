"""The request shapes of other servers' dialects: what they take, what they refuse, and how both are named."""

import pytest
from pydantic import ValidationError

from services.common.wire.api_v1 import ApiEmbedRequest, E5BatchRequest
from services.common.wire.base import MAX_INPUT_CHARS
from services.common.wire.dialects import DialectModel, input_list
from services.common.wire.openai import OpenAIEmbeddingReply, OpenAIEmbeddingRequest
from services.common.wire.tei import (
    TeiDecodeRequest,
    TeiEmbedRequest,
    TeiInfo,
    TeiOpenAIRequest,
    TeiSimilarityRequest,
    TeiTokenizeRequest,
)
from services.embedding.dialects.api_v1 import duration


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        (["a", [1, 2], "b"], ["a", (1, 2), "b"]),
        ("", [""]),
        ([], []),
        ([[]], [()]),
        (" ", [" "]),
        ([0, 2**32 - 1], [(0, 2**32 - 1)]),
    ],
)
def test_inputs_are_texts_token_ids_or_both(given, expected):
    """TEI's and OpenAI's inputs become one list; a bare list of numbers is one input."""
    assert TeiEmbedRequest(inputs=given).input_list() == expected
    assert OpenAIEmbeddingRequest(input=given, model="m").inputs() == expected
    assert input_list(given) == expected


@pytest.mark.parametrize(
    ("given", "at"),
    [
        (None, ()),
        (5, ()),
        (True, ()),
        ({"text": "a"}, ()),
        (["a", 5], (1,)),
        ([1, "a"], (1,)),
        ([1, True], (1,)),
        ([1.5], (0,)),
        ([[1], [-1]], (1, 0)),
        ([2**32], (0,)),
        (["a", None], (1,)),
        ([["a"]], (0, 0)),
        (["a", "b\0"], (1,)),
        (["a", "x" * (MAX_INPUT_CHARS + 1)], (1,)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_inputs_are_refused_by_index(given, at):
    """One error, of the branch that was meant, which names the input at fault."""
    with pytest.raises(ValidationError) as caught:
        TeiEmbedRequest(inputs=given)
    (error,) = caught.value.errors()
    assert tuple(part for part in error["loc"] if isinstance(part, int)) == at


def test_unknown_fields_are_ignored_and_types_are_not_coerced():
    """Servers of these dialects ignore what they do not know; a string is still no boolean and no number."""
    assert TeiEmbedRequest(inputs="a", colour="red").normalize is True  # type: ignore[call-arg]
    for body in (
        {"inputs": "a", "truncate": "yes"},
        {"inputs": "a", "dimensions": "8"},
        {"inputs": "a", "normalize": 1},
    ):
        with pytest.raises(ValidationError):
            TeiEmbedRequest.model_validate(body)


@pytest.mark.parametrize(
    ("given", "expected"), [("left", "left"), ("Left", "left"), ("right", "right"), ("Right", "right")]
)
def test_directions_may_begin_with_a_capital(given, expected):
    """As TEI's aliases."""
    assert TeiEmbedRequest(inputs="a", truncation_direction=given).direction() == expected
    assert ApiEmbedRequest(inputs="a", truncation_direction=given).direction() == expected


def test_defaults_are_those_of_the_servers():
    """What a request leaves out."""
    tei = TeiEmbedRequest(inputs="a")
    assert (tei.truncate, tei.direction(), tei.prompt_name, tei.normalize, tei.dimensions) == (
        None,
        "right",
        None,
        True,
        None,
    )
    openai = OpenAIEmbeddingRequest(input="a", model="m")
    assert (openai.encoding_format, openai.dimensions, openai.user) == ("float", None, None)
    assert TeiOpenAIRequest(input="a").model is None
    assert E5BatchRequest(texts=["a"]).is_query is False
    assert TeiTokenizeRequest(inputs="a").add_special_tokens is True
    assert TeiDecodeRequest(ids=[1]).skip_special_tokens is True
    similarity = {"source_sentence": "a", "sentences": ["b"]}
    assert TeiSimilarityRequest.model_validate({"inputs": similarity}).parameters is None


def test_openai_wants_a_model():
    """The model's name is part of OpenAI's request; only a TEI does without."""
    with pytest.raises(ValidationError):
        OpenAIEmbeddingRequest.model_validate({"input": "a"})


def test_ids_to_decode_are_one_sequence_or_several():
    """A bare list of numbers is one sequence."""
    assert TeiDecodeRequest(ids=[1, 2]).sequences() == [[1, 2]]
    assert TeiDecodeRequest(ids=[[1], [2, 3]]).sequences() == [[1], [2, 3]]
    assert TeiDecodeRequest(ids=[]).sequences() == [[]]


def test_replies_have_the_keys_of_the_originals():
    """OpenAI's reply and TEI's /info, key by key."""
    assert set(OpenAIEmbeddingReply.model_fields) == {"object", "data", "model", "usage"}
    assert set(TeiInfo.model_fields) == {
        "model_id",
        "model_sha",
        "model_dtype",
        "served_model_name",
        "model_type",
        "max_concurrent_requests",
        "max_input_length",
        "max_batch_tokens",
        "max_batch_requests",
        "max_client_batch_size",
        "auto_truncate",
        "tokenization_workers",
        "version",
        "sha",
        "docker_label",
    }


def test_every_request_ignores_what_it_does_not_know():
    """No dialect's request forbids fields, at any depth of its class tree."""

    def tree(cls: type) -> list[type]:
        return [cls, *(one for sub in cls.__subclasses__() for one in tree(sub))]

    for cls in tree(DialectModel):
        assert cls.model_config["extra"] == "ignore", cls


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.0, "0µs"), (0.12, "120µs"), (0.9999, "999µs"), (1.0, "1ms"), (34.6, "35ms"), (2500.0, "2500ms")],
)
def test_durations_have_a_unit(milliseconds, text):
    """Whole microseconds below a millisecond, whole milliseconds from there on."""
    assert duration(milliseconds) == text
