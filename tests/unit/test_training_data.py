"""What the reranker is trained on: parts that share no topic, questions cut from text, and checksums of it all."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.training_corpus import write_corpus, write_lines
from training.data import DataError, Passage, Question, available, read
from training.questions import made_questions, sentences, shown
from training.recipe import Recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The corpus; tests do not change it."""
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["squad_dev", "scifact"])
def test_no_topic_is_in_two_parts(data, name):
    """A passage that answers a held-back or tested question is closed, and answers no question that is trained on."""
    collection = read(name, data)
    trained = {answer for question in collection.part("train") for answer in question.answers}
    others = {answer for part in ("held-back", "test") for q in collection.part(part) for answer in q.answers}
    assert trained
    assert others
    assert not trained & others
    assert not trained & collection.closed
    assert others <= collection.closed
    groups = {collection.passages[answer].group for answer in trained}
    assert groups.isdisjoint(collection.passages[answer].group for answer in others)


def test_tested_sets_are_closed_altogether(data):
    """Nothing of a set that is only tested on may be trained on; judgements of zero are no answers."""
    wikiqa = read("wikiqa", data)
    assert wikiqa.closed == set(range(len(wikiqa.passages)))
    assert [question.part for question in wikiqa.questions] == ["test"] * 5
    assert wikiqa.questions[0].answers == (0,)
    assert made_questions(wikiqa) == []


def test_the_same_question_asked_twice_has_both_answers(data):
    """Questions that differ in case and spaces only are one: the other's answer must not become a wrong one."""
    first = read("squad_dev", data).questions[0]
    assert first.answers == (0, 1)


def test_same_input_same_checksum(data, tmp_path):
    """The checksum of a set names its content: it changes with any passage or question, and with nothing else."""
    before = read("squad_dev", data).checksum
    assert read("squad_dev", data).checksum == before
    other = write_corpus(tmp_path)
    assert read("squad_dev", other).checksum == before
    collection = read("squad_dev", other)
    passages = [{"_id": p.id, "title": p.title, "text": p.text} for p in collection.passages]
    passages[3]["text"] += " More."
    write_lines(other / "squad_dev" / "passages.jsonl.gz", passages)
    assert read("squad_dev", other).checksum != before


def test_recipe_names_what_it_makes():
    """A run has another name as soon as a constant or an input changes."""
    recipe = Recipe()
    assert recipe.key("a", "b") == Recipe().key("a", "b")
    keys = {
        recipe.key("a", "b"),
        recipe.key("a", "c"),
        replace(recipe, seed=2).key("a", "b"),
        replace(recipe, sharpness=1.6).key("a", "b"),
    }
    assert len(keys) == 4


def test_made_questions_are_the_same_each_time_and_from_open_passages(data):
    """Questions are cut from passages that may be trained on, and their passage is their answer."""
    for name in ("squad_dev", "scifact"):
        collection = read(name, data)
        made = made_questions(collection)
        assert made == made_questions(read(name, data))
        assert made
        assert not {answer for question in made for answer in question.answers} & collection.closed
        for question in made:
            words = question.text.split()
            assert all(word in collection.passages[question.answers[0]].whole for word in words)


def test_a_question_is_not_shown_in_its_passage():
    """The student must not find a title or a sentence again by its letters, nor see that only the answer lacks one."""
    text = "One river runs under this bridge. The second river runs over there. A third one is dry now."
    passage, other = Passage("a", "Rivers", text, "a"), Passage("b", "Stones", "Stones lie still.", "b")
    title = Question("Rivers", (0,), "title", "train")
    assert shown(passage, title) == text
    assert shown(other, title) == "lie still."
    cut = Question(sentences(text)[1], (0,), "sentence", "train")
    assert cut.text not in shown(passage, cut)
    assert "A third one is dry now." in shown(passage, cut)
    assert shown(passage, Question("river", (0,), "keys", "train")) == f"Rivers\n{text}"


def test_a_few_passages_keep_their_questions_answers(data):
    """A limited collection has fewer passages, and its questions still point to what answers them."""
    whole, few = read("squad_dev", data), read("squad_dev", data, limit=10)
    assert len(few.passages) < len(whole.passages)
    texts = {question.text: [whole.passages[a] for a in question.answers] for question in whole.questions}
    assert few.questions
    for question in few.questions:
        assert [few.passages[answer] for answer in question.answers] == texts[question.text]


def test_a_broken_set_is_named(data, tmp_path):
    """The message says which set is not what it should be."""
    write_lines(tmp_path / "squad_dev" / "passages.jsonl.gz", [{"title": "no id", "text": "x"}])
    with pytest.raises(DataError, match="squad_dev"):
        read("squad_dev", tmp_path)
    with pytest.raises(DataError, match="wikiqa"):
        read("wikiqa", tmp_path)
    assert available(data) == ["squad_dev", "scifact", "python_docs", "wikiqa"]
