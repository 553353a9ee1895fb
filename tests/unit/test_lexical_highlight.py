"""Highlights: the passage that has most of the question's words, and where they are in it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.search.shards.lexical import TantivyHighlighter, analyze

_FILLER = "Nothing to see here at all. " * 20


def highlight(text, question, *, language="english", max_chars=80):
    return TantivyHighlighter().highlight(text, analyze(question, language), language, max_chars=max_chars)


def marked(found):
    return [found.text[start:end] for start, end in found.marks]


def test_words_are_marked_in_whatever_form_they_stand():
    """Inflected, accented and capital forms are marked as they are written."""
    found = highlight("Running past two CAFÉS.", "run cafe")
    assert found.text == "Running past two CAFÉS."
    assert marked(found) == ["Running", "CAFÉS"]


def test_the_passage_is_where_most_different_words_are():
    """Two different words near each other beat one word many times."""
    text = "Apple apple apple. " + _FILLER + "An apple and a pear grow here. " + _FILLER
    found = highlight(text, "apple pear")
    assert "An apple and a pear grow here." in found.text
    assert marked(found) == ["apple", "pear"]


def test_a_passage_begins_and_ends_with_sentences_where_they_fit():
    """A sentence that is short enough is not cut."""
    found = highlight(_FILLER + "The pear is ripe. " + _FILLER, "pear", max_chars=60)
    assert found.text.startswith(("The", "Nothing"))
    assert found.text.endswith((".", "here", "all", "see", "to", "at", "Nothing"))


def test_long_sentences_are_cut_between_words():
    """Without sentences a passage begins and ends with whole words."""
    words = [f"filler{number}" for number in range(200)]
    words[100] = "target"
    found = highlight(" ".join(words), "target", max_chars=100)
    assert set(found.text.split()) <= set(words)
    assert 60 <= len(found.text) <= 100
    assert marked(found) == ["target"]


@pytest.mark.parametrize("text", ["", "nothing of that", "appl."])
def test_a_text_without_the_words_has_no_highlight(text):
    """There is no passage to show."""
    assert highlight(text, "pear") is None


def test_places_are_counted_in_characters():
    """Letters of several bytes, or outside the basic plane, do not shift marks."""
    assert marked(highlight("🙂🙂 ÄÖÜ straße 🙂 pear, 🍐!", "pear")) == ["pear"]


def test_pairs_of_characters_are_marked_together():
    """In scripts without spaces the overlapping pairs of a word are one mark."""
    found = highlight("昨日は新しい東京都庁に行きました。", "東京都")
    assert marked(found) == ["東京都"]
    assert marked(highlight("ｶﾞﾗｽの窓", "ガラス")) == ["ｶﾞﾗｽ"]


@given(
    st.text(st.sampled_from("ab cd. 東京都。é\u0301🙂\n"), max_size=120),
    st.sampled_from(["ab", "cd ab", "東京", "é b"]),
    st.integers(1, 60),
)
@settings(max_examples=300, deadline=None)
@example("aa東京aaaaaaaaaaaaaaa。", "東京", 19)
def test_passages_keep_to_their_length_and_marks_to_the_terms(text, question, max_chars):
    """A passage is a piece of the text, not too long, and each mark in it has some term of the question."""
    found = highlight(text, question, max_chars=max_chars)
    if found is None:
        return
    assert found.text in text
    assert 0 < len(found.text) <= max_chars
    assert found.marks
    assert all(0 <= start < end <= len(found.text) for start, end in found.marks)
    assert all(one[1] <= other[0] for one, other in zip(found.marks, found.marks[1:], strict=False))
    for start, end in found.marks:
        assert set(analyze(found.text[start:end])) & set(analyze(question))
