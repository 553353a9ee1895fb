"""Candidates with the teacher's scores, and the lists that a step of training reads."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.common.encoders import Encoder, EncoderOptions, open_encoder
from services.rerank.backends.late_interaction import LateInteractionBackend
from services.rerank.ports import Window
from tests.tiny_models import write_bert
from tests.training_corpus import write_corpus
from training.candidates import Prepared, hybrid, prepare, token_vectors
from training.data import Collection, read
from training.lists import Lists, chosen_questions
from training.loss import absolute_loss, agreement, distillation_loss
from training.recipe import Recipe
from training.teacher import Teacher

RECIPE = replace(Recipe(), questions_per_step=3)
IN_TORCH = EncoderOptions(runtime="torch", precision="fp32", device="cpu", threads=1)


@pytest.fixture(scope="module")
def squad(tmp_path_factory) -> Collection:
    """A small set with held-back articles."""
    return read("squad_dev", write_corpus(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Iterator[Encoder]:
    """A tiny model in torch at fp32."""
    place = tmp_path_factory.mktemp("model")
    opened = open_encoder(str(write_bert(place / "bert")), IN_TORCH)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where candidates are kept."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def prepared(squad, encoder, folder) -> Prepared:
    """The small set with its candidates."""
    return prepare(squad, chosen_questions(squad, RECIPE), encoder, folder, lambda line: None)


def test_answers_are_candidates_and_closed_passages_are_not(squad, prepared):
    """Each question's answers are among its candidates; one that is trained on never sees a closed passage."""
    assert {question.part for question in prepared.questions} == {"train", "held-back"}
    for question, row in zip(prepared.questions, prepared.rows, strict=True):
        assert set(question.answers) <= set(row.passages.tolist())
        assert len(set(row.passages.tolist())) == len(row.passages)
        if question.part == "train":
            assert not set(row.passages.tolist()) & squad.closed


def test_maxsim_is_what_its_definition_says(squad, encoder, prepared):
    """
    The mean over the question's tokens of the greatest cosine to a token of the passage.

    Special ones are left out, and punctuation in passages.
    """
    marks = set(encoder.tokenizer.punctuation().tolist())

    def unit(text: str, leave_out: set[int]) -> np.ndarray:
        (tokens,) = encoder.tokenize([text], max_tokens=256)
        (vectors,) = encoder.per_token([tokens])
        inner = vectors[[at for at in range(1, len(tokens.ids) - 1) if tokens.ids[at] not in leave_out]]
        return inner / np.linalg.norm(inner, axis=1, keepdims=True)

    row = prepared.rows[0]
    question = unit(prepared.questions[0].text, set())
    for at, found in list(zip(row.passages, row.maxsim, strict=True))[:8]:
        expected = (question @ unit(squad.passages[int(at)].whole, marks).T).max(axis=1).mean()
        assert found == pytest.approx(expected, abs=2e-3)


def test_maxsim_is_the_products(encoder, squad):
    """A pair has the raw score that the rerank service gives it, whatever punctuation there is."""
    texts = [*(passage.whole[:80] for passage in squad.passages[:3]), "... !", "Who, me? Yes: you (and she)."]
    question = texts[0][:30]
    _, asked = token_vectors(encoder, [question], 96)
    _, made = token_vectors(encoder, texts, 256, leave_out=encoder.tokenizer.punctuation())
    name = str(encoder.description.directory)
    backend = LateInteractionBackend(name, IN_TORCH, cache_bytes=1 << 20, max_tokens=256)
    query = backend.tokenize_query(question)
    windows = [Window(query, each, 0, len(each.ids)) for each in backend.tokenize(texts)]
    expected = backend.score(windows)[:, 0]
    assert made.maxsim(asked.of(0), np.arange(len(texts), dtype=np.int32)) == pytest.approx(expected, abs=5e-3)


def test_candidates_are_kept_and_found_again(squad, encoder, prepared, folder):
    """A second call reads what the first one made; a damaged file is made again, the same as before."""
    questions = chosen_questions(squad, RECIPE)
    lines: list[str] = []
    again = prepare(squad, questions, encoder, folder, lines.append)
    assert len(lines) == 1
    (file,) = folder.glob("squad_dev-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    made_again = prepare(squad, questions, encoder, folder, lambda line: None)
    for one in (again, made_again):
        for row, other in zip(prepared.rows, one.rows, strict=True):
            assert all(np.array_equal(mine, its) for mine, its in zip(row, other, strict=True))


def test_key_changes_with_the_questions(squad, encoder, prepared, folder):
    """Other questions, or other passages, are other candidates."""
    fewer = prepare(squad, chosen_questions(squad, RECIPE)[:5], encoder, folder, lambda line: None)
    closed = replace(squad, closed=frozenset())
    opened = prepare(closed, chosen_questions(squad, RECIPE)[:5], encoder, folder, lambda line: None)
    assert len({prepared.key, fewer.key, opened.key}) == 3


def test_a_step_is_the_same_whatever_was_read_before(prepared):
    """Step n depends on the recipe and n alone, over the ends of rounds too; another seed gives another."""
    one, other = Lists([prepared], RECIPE), Lists([prepared], RECIPE)
    steps = [one.step(number) for number in range(3 * len(one) // RECIPE.questions_per_step)]
    last = len(steps) - 1
    for number in (last, 1, last // 2):
        for mine, its in zip(steps[number], other.step(number), strict=True):
            assert mine[:2] == its[:2]
            assert np.array_equal(mine.targets, its.targets)
    assert Lists([prepared], replace(RECIPE, seed=2)).step(0)[0][:2] != steps[0][0][:2]


def test_a_round_asks_every_question_as_often_as_the_recipe_says(prepared):
    """One round has each question once, real ones as many times as their set's share says."""
    lists = Lists([prepared], replace(RECIPE, questions_per_step=1))
    trained = [question.text for question in prepared.questions if question.part == "train"]
    assert len(lists) == len(trained)
    assert sorted(lists.step(n)[0].question for n in range(len(lists))) == sorted(trained)


def test_a_list_begins_with_an_answer_and_has_no_other(squad, prepared):
    """The first text answers, no other one does, and only those from far down are known to be wrong."""
    by_text = {passage.whole: at for at, passage in enumerate(squad.passages)}
    answers = {q.text: set(q.answers) for q in prepared.questions if q.kind == "real"}
    for number in range(20):
        for one in Lists([prepared], RECIPE).step(number):
            assert len(one.texts) == RECIPE.passages_per_question == len(one.targets) == len(one.known)
            if one.question in answers:
                assert [by_text[text] in answers[one.question] for text in one.texts] == [True] + [False] * 5
                assert one.known[0] == 1.0
                assert np.isnan(one.known[1:5]).all()
                assert one.known[5] == 0.0


def test_targets_are_the_mixture_raised_where_the_answer_is_known(prepared):
    """A real answer has more added than a passage that a question was cut from, and key words have nothing."""
    teacher = Teacher(prepared, RECIPE)
    scores = teacher.scores(prepared.rows[0])
    plain = scores * RECIPE.sharpness
    for kind, bonus in (("real", RECIPE.known_bonus), ("sentence", RECIPE.cut_bonus), ("keys", 0.0)):
        raised = teacher.targets(scores, 1, kind) - plain
        assert raised[1] == pytest.approx(bonus, abs=1e-5)
        assert np.delete(raised, 1) == pytest.approx(0.0, abs=1e-5)
    assert np.corrcoef(scores, hybrid(prepared.rows[0]))[0, 1] > 0.3


def test_loss_is_least_where_the_student_says_what_the_teacher_says(prepared):
    """KL divergence is zero for the teacher's own logits, whatever is added to a list, and greater for others."""
    lists = Lists([prepared], RECIPE).step(0)
    same = torch.cat([torch.from_numpy(one.targets) + 5.0 for one in lists])
    assert float(distillation_loss(same, lists)) == pytest.approx(0.0, abs=1e-5)
    assert float(distillation_loss(same * 0.0, lists)) > 0.01
    right = torch.cat([torch.where(torch.from_numpy(one.known) == 1.0, 9.0, -9.0) for one in lists])
    assert float(absolute_loss(right, lists)) < 0.01 < float(absolute_loss(-right, lists))
    assert agreement(right, [one for one in lists if one.known[0] == 1.0] or lists) >= 0.0
