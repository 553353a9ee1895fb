"""The training loop: stopped and gone on with, it makes the same weights; and how its time is counted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.common.encoders import EncoderOptions, open_encoder
from tests.tiny_models import write_bert
from tests.training_corpus import write_corpus
from training.candidates import Prepared, prepare
from training.data import read
from training.lists import Lists, chosen_questions
from training.loop import Budget, StepTimes, Stopped, Training
from training.loss import distillation_loss
from training.model import new_student, score, trainable
from training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_torch_thread")

RECIPE = replace(
    Recipe(), questions_per_step=2, short_tokens=24, long_tokens=32, max_tokens=48, warmup_steps=2, learning_rate=5e-3
)
STEPS = 6
PAIRS = [
    ("river stone", "the river of stone."),
    ("glass", "an engine"),
    ("winter music", "music after winter and glass"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny embedding model."""
    return write_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory) -> Prepared:
    """A small set with its candidates."""
    place = tmp_path_factory.mktemp("prepared")
    encoder = open_encoder(
        str(model),
        EncoderOptions(runtime="torch", precision="fp32", device="cpu", threads=1, cache_dir=place / "cache"),
    )
    squad = read("squad_dev", write_corpus(place / "data"))
    return prepare(squad, chosen_questions(squad, RECIPE), encoder, place, lambda line: None)


@pytest.fixture(scope="module")
def lists(prepared) -> Lists:
    """What is trained on."""
    return Lists([prepared], RECIPE)


@pytest.fixture
def training(model, lists, tmp_path):
    """Return a function that makes a training that keeps its checkpoint in this test's directory."""

    def made(name: str = "one", key: str = "key", lists: Lists = lists) -> tuple[Training, list[str]]:
        student = new_student(model, max_tokens=RECIPE.max_tokens, seed=1, device="cpu")
        lines: list[str] = []
        file = tmp_path / name / "checkpoint.pt"
        return Training(student, lists, RECIPE, checkpoint=file, key=key, say=lines.append), lines

    return made


def weights(one: Training) -> list[torch.Tensor]:
    """Return what the student is left with."""
    return [parameter.detach().clone() for _, parameter in trainable(one.student)]


def test_stopped_and_gone_on_with_makes_the_same_weights(training, lists, tmp_path):
    """A training stopped after every step, each time in a new process's place, ends bit for bit as one that never was."""
    budget = Budget(steps=STEPS)
    whole, _ = training("whole")
    fixed = lists.fixed("held-back", 4)
    whole.run(budget, fixed)
    # What a killed process was writing is neither used nor left behind.
    torn = tmp_path / "torn" / ".making-checkpoint"
    torn.parent.mkdir()
    torn.write_bytes(b"half a checkpoint")
    for step in range(1, STEPS):
        part, _ = training("torn")
        part.stop.set()
        with pytest.raises(Stopped, match=f"step {step};"):
            part.run(budget, fixed)
    last, lines = training("torn")
    last.run(budget, fixed)
    assert lines[0].startswith(f"goes on after step {STEPS - 1}")
    assert last.progress.steps == whole.progress.steps == STEPS
    assert all(torch.equal(mine, its) for mine, its in zip(weights(last), weights(whole), strict=True))
    assert not torn.exists()


def test_what_is_done_is_not_done_again(training, lists):
    """A finished training run again trains nothing, and ends with the same weights and log."""
    budget = Budget(steps=2)
    first, _ = training()
    first.run(budget, lists.fixed("held-back", 4))
    again, _ = training()
    again.run(budget, lists.fixed("held-back", 4))
    assert again.progress.steps == 2
    assert again.progress.log == first.progress.log
    assert all(torch.equal(mine, its) for mine, its in zip(weights(again), weights(first), strict=True))


def test_a_checkpoint_of_other_inputs_is_not_used(training):
    """Another key (another recipe or other data) begins at the beginning."""
    first, _ = training()
    first.run(Budget(steps=2), [])
    other, lines = training(key="another")
    other.stop.set()
    with pytest.raises(Stopped, match="step 1;"):
        other.run(Budget(steps=2), [])
    assert not any(line.startswith("goes on") for line in lines)


def test_it_learns_and_leaves_the_word_embeddings_alone(training, prepared):
    """The loss falls on what it is taught, and the word embeddings stay those of the embedding model."""
    few = Lists([replace(prepared, questions=prepared.questions[:3], rows=prepared.rows[:3])], RECIPE)
    one, _ = training(lists=few)
    before = one.student.get_submodule("0.model.embeddings.word_embeddings").weight.detach().clone()
    fixed = [one for number in range(10) for one in few.step(number)]
    pairs = [(each.question, text) for each in fixed for text in each.texts]
    losses = []
    for steps in (0, 40):
        one.run(Budget(steps=steps), fixed)
        made = score(one.student, pairs, max_tokens=RECIPE.long_tokens)
        losses.append(float(distillation_loss(torch.from_numpy(made), fixed)))
    assert losses[1] < 0.9 * losses[0]
    assert torch.equal(one.student.get_submodule("0.model.embeddings.word_embeddings").weight, before)


def test_scores_are_those_of_the_library(training):
    """The loop's own batching, sorted and in bf16, gives what `CrossEncoder.predict` gives, within bf16."""
    one, _ = training()
    expected = one.student.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert score(one.student, PAIRS, max_tokens=RECIPE.max_tokens) == pytest.approx(expected, abs=0.02)


def test_pauses_are_not_training():
    """A step during which the process was suspended counts a few seconds; a machine that is slow throughout counts."""
    times = StepTimes()
    assert [times.counted(1.5) for _ in range(5)] == [1.5] * 5
    assert times.counted(3600.0) == 10.0
    assert times.counted(1.5) == 1.5
    slow = StepTimes()
    counted = [slow.counted(25.0) for _ in range(10)]
    assert counted[-1] == 25.0
    assert times.rate() == pytest.approx(7 / (6 * 1.5 + 10.0))


def test_a_budget_is_steps_or_seconds():
    """Steps count whatever time they take, seconds whatever steps were made in them."""
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(seconds=100.0).progress(10**9, 25.0) == 0.25
    assert Budget(seconds=100.0).progress(0, 250.0) == 1.0


def test_candidates_have_numbers(prepared):
    """Nothing that is taught is infinite or not a number."""
    assert all(np.isfinite(column).all() for row in prepared.rows for column in row)
