"""Text to token ids as the model's own tokenizer makes them, cut at either end."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from services.common.encoders.golden import GOLDEN_TEXTS
from services.common.encoders.tokenizer import PythonTokenizer, TextTokenizer, make_tokenizer
from services.common.model_files import DEFAULT_MODEL, resolve_model

LIMIT = 32
LONG = " ".join(f"word{n} and, 東京 {n * 7}." for n in range(20_000))


@pytest.fixture(scope="module")
def theirs():
    """The packaged model's tokenizer as transformers loads it."""
    return AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def tokenizer(theirs) -> TextTokenizer:
    """The same through the library alone."""
    made, _ = make_tokenizer(theirs, max_tokens=LIMIT, samples=GOLDEN_TEXTS)
    return made


def test_the_library_alone_does_where_it_agrees(theirs) -> None:
    """For the packaged model no transformers is needed: its JSON gives the same ids."""
    made, content = make_tokenizer(theirs, max_tokens=LIMIT, samples=GOLDEN_TEXTS)
    assert content is not None
    again = TextTokenizer.from_json(content, max_tokens=LIMIT)
    assert again.tokenize(GOLDEN_TEXTS) == made.tokenize(GOLDEN_TEXTS)


def test_a_cut_keeps_the_special_tokens(tokenizer: TextTokenizer, theirs) -> None:
    """Cut on the right the beginning stays, on the left the end, each between the model's special tokens."""
    text = "alpha beta gamma delta " * 20
    whole = theirs(text)["input_ids"]
    (right,) = tokenizer.tokenize([text])
    (left,) = tokenizer.tokenize([text], direction="left")
    assert right.truncated
    assert left.truncated
    assert list(right.ids) == [*whole[: LIMIT - 1], whole[-1]]
    assert list(left.ids) == [whole[0], *whole[-(LIMIT - 1) :]]


def test_a_smaller_limit_holds_and_a_larger_does_not(tokenizer: TextTokenizer) -> None:
    """A caller may ask for fewer tokens than the model reads, not for more."""
    text = "word " * 200
    assert [len(tokenizer.tokenize([text], max_tokens=limit)[0].ids) for limit in (2, 8, LIMIT, 100)] == [
        2,
        8,
        LIMIT,
        LIMIT,
    ]


@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_very_long_text_is_cut_as_if_it_were_read_whole(tokenizer: TextTokenizer, theirs, direction) -> None:
    """Only part of a long text is tokenised, and the ids are those of the whole text's beginning or end."""
    whole = theirs(LONG)["input_ids"]
    expected = [*whole[: LIMIT - 1], whole[-1]] if direction == "right" else [whole[0], *whole[-(LIMIT - 1) :]]
    (cut,) = tokenizer.tokenize([LONG], direction=direction)
    assert cut.truncated
    assert list(cut.ids) == expected


@pytest.mark.parametrize("text", ["x" * 50_000, " " * 50_000, "東" * 50_000, ("y" * 5000 + " ") * 20])
@pytest.mark.parametrize("direction", ["right", "left"])
def test_long_texts_without_words_are_read_whole(tokenizer: TextTokenizer, theirs, text: str, direction) -> None:
    """Where no white space is near, or it gives no tokens, the whole text is read."""
    whole = theirs(text)["input_ids"]
    (cut,) = tokenizer.tokenize([text], direction=direction)
    if len(whole) <= LIMIT:
        assert list(cut.ids) == whole
        assert not cut.truncated
    else:
        expected = [*whole[: LIMIT - 1], whole[-1]] if direction == "right" else [whole[0], *whole[-(LIMIT - 1) :]]
        assert list(cut.ids) == expected


def test_order_is_kept_among_long_and_short(tokenizer: TextTokenizer) -> None:
    """Long texts, which are handled apart, stay in their places."""
    texts = [LONG, "one", LONG + " end", "two three"]
    assert tokenizer.tokenize(texts) == [tokenizer.tokenize([text])[0] for text in texts]


def test_threads_may_cut_differently_at_once(tokenizer: TextTokenizer) -> None:
    """Threads that ask for different limits and ends at the same time each get their own."""
    asked = [(limit, direction) for limit in (4, 9, 17) for direction in ("right", "left")] * 20
    expected = [tokenizer.tokenize(GOLDEN_TEXTS, *each) for each in asked]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda each: tokenizer.tokenize(GOLDEN_TEXTS, *each), asked)) == expected


def test_pieces_say_what_they_cover(tokenizer: TextTokenizer) -> None:
    """Offsets count characters, not bytes, and a piece's text is what lies between them."""
    text = "Naïve café, 東京 🙂 ok"
    pieces = tokenizer.pieces(text)
    assert [piece.special for piece in pieces] == [True, *[False] * (len(pieces) - 2), True]
    assert (pieces[0].start, pieces[0].stop, pieces[0].text) == (None, None, "[CLS]")
    for piece in pieces[1:-1]:
        assert piece.text == text[piece.start : piece.stop]
    assert "東" in [piece.text for piece in pieces]
    assert tokenizer.pieces(text, add_special_tokens=False) == pieces[1:-1]


def test_content_is_whole_texts_without_special_tokens(tokenizer: TextTokenizer, theirs) -> None:
    """Uncut, in order, with the characters that each token covers; framed by the special tokens it is the whole text."""
    texts = ["Naïve café, 東京 🙂 ok", "", "alpha beta " * 50]
    contents = tokenizer.content(texts)
    for text, (ids, offsets) in zip(texts, contents, strict=True):
        assert [*tokenizer.before, *ids, *tokenizer.after] == theirs(text)["input_ids"]
        assert offsets is not None
        assert offsets.tolist() == [
            [piece.start, piece.stop] for piece in tokenizer.pieces(text, add_special_tokens=False)
        ]
        assert offsets.shape == (len(ids), 2)
    (alone,) = tokenizer.content(texts[:1])
    assert [array.tolist() for array in alone] == [array.tolist() for array in contents[0]]
    assert tokenizer.content([]) == []


def test_decoding_gives_the_text_back(tokenizer: TextTokenizer) -> None:
    """Ids become their text, with special tokens only where they are asked for; unknown ids are nothing."""
    (tokens,) = tokenizer.tokenize(["a short question?"])
    assert tokenizer.decode(tokens.ids) == "a short question?"
    assert tokenizer.decode(tokens.ids, skip_special_tokens=False).startswith("[CLS] a short")
    assert tokenizer.decode([*tokens.ids, 10**9]) == "a short question?"


def test_a_damaged_file_is_a_value_error() -> None:
    """What is no tokenizer is told as a ValueError, whatever the library raises."""
    for content in ("", "{}", "[1]", '{"version": "1.0", "model": {"type": "Other"}}'):
        with pytest.raises(ValueError):
            TextTokenizer.from_json(content, max_tokens=8)


def test_a_tokenizer_in_python_works_too(tmp_path: Path) -> None:
    """One that the library has no counterpart for goes through transformers, and is cut the same way."""
    theirs = ByT5Tokenizer()
    made, content = make_tokenizer(theirs, max_tokens=8, samples=GOLDEN_TEXTS)
    assert content is None
    assert isinstance(made, PythonTokenizer)
    whole = theirs("abcdefghijkl")["input_ids"]
    assert list(made.tokenize(["abcdefghijkl"])[0].ids) == [*whole[:7], whole[-1]]
    assert list(made.tokenize(["abcdefghijkl"], direction="left")[0].ids) == whole[-8:]
    assert made.tokenize(["abc"])[0].truncated is False
    assert made.decode(whole) == "abcdefghijkl"
    assert [piece.special for piece in made.pieces("ab")] == [False, False, True]
    ((ids, offsets),) = made.content(["abcdefghijkl"])
    assert [*made.before, *ids, *made.after] == whole
    assert offsets is None


def test_where_the_two_differ_transformers_decides(theirs) -> None:
    """A library tokenizer that does not give the model's ids on the samples is not used."""

    class Different:
        backend_tokenizer = theirs.backend_tokenizer
        all_special_ids = theirs.all_special_ids

        def __call__(self, texts, **options):
            changed = texts.replace("o", "a") if isinstance(texts, str) else [text.replace("o", "a") for text in texts]
            return theirs(changed, **options)

    made, content = make_tokenizer(Different(), max_tokens=LIMIT, samples=GOLDEN_TEXTS)
    assert content is None
    assert list(made.tokenize(["so"])[0].ids) == theirs("sa")["input_ids"]
