"""Training on a user's judgements: who is held back, what is measured, and that a worse model is not written."""

import random
import signal
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.embedding.offline.console import OfflineError
from tests.own_judgements import QUERIES, judged, write_answers
from tests.tiny_models import write_bert
from tests.tiny_pair_models import write_classifier
from tests.training_corpus import sentence
from training.data import Collection, DataError, Passage, Question
from training.loop import Stopped
from training.own.asking import Gathered, Proposed
from training.own.command import tell
from training.own.fine_tuning import Plan, fine_tune, recipe_for
from training.own.judgements import Judged, divided, known_only, read_judged
from training.own.starting import default_start, open_start
from training.own.verdict import Ranked, Verdict, sign_test

TRAINED, HELD_BACK, CANDIDATES = 24, 8, 8


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch, tmp_path) -> Iterator[None]:
    """Tests share two cores with others; models that are made whole stay in the test's folder."""
    before = torch.get_num_threads()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    torch.set_num_threads(before)


def gathered(*, turned: bool = False) -> Gathered:
    """
    Return questions of which each has one candidate that says again and again that it is right.

    *turned* lets those that are trained on be answered by one that says that it is wrong.
    """
    rng = random.Random(3)
    passages, questions, proposed, grades = [], [], [], []
    for number in range(TRAINED + HELD_BACK):
        right = len(passages) + rng.randrange(CANDIDATES)
        found = Proposed()
        for at in range(len(passages), len(passages) + CANDIDATES):
            text = ("right " if at == right else "wrong ") * 6 + sentence(rng)
            passages.append(Passage(str(at), "", text, str(at)))
            found.passages.append(at)
            found.bm25[at] = 1.0
        part = "train" if number < TRAINED else "held-back"
        wrong = next(at for at in found.passages if at != right)
        answer = wrong if turned and part == "train" else right
        questions.append(Question(sentence(rng), (answer,), "real", part))
        proposed.append(found)
        grades.append({answer: 1})
    return Gathered(
        Collection("collection c", tuple(passages), tuple(questions), frozenset()), questions, proposed, grades
    )


def test_a_worse_model_is_not_written(tmp_path, capsys):
    """What learnt from wrong answers ranks worse than what it began as: both are measured, and nothing is left of it."""
    begun = open_start(str(write_bert(tmp_path / "bert")))
    labels = {"mixture": (0.0, 0.0, 0.0), "known_bonus": 6.0, "learning_rate": 3e-3, "warmup_steps": 5}
    recipe = replace(recipe_for(begun, "collection c", seed=1), questions_per_step=4, absolute=1.0, **labels)
    plan = Plan(begun, tmp_path / "good", tmp_path / "work", 5.0, recipe, rounds=2, device="cpu", threads=1)
    verdict = fine_tune(plan, gathered(), lambda line: None)
    assert not verdict.is_worse
    assert np.mean(verdict.after.alone) > 0.9
    assert (plan.out / "cascade.json").is_file()
    assert not plan.work.exists()

    worse = replace(plan, start=open_start(str(plan.out)), out=tmp_path / "worse")
    verdict = fine_tune(worse, gathered(turned=True), lambda line: None)
    assert verdict.is_worse
    assert np.mean(verdict.before.alone) > 0.9 > 0.6 > np.mean(verdict.after.alone)
    assert not worse.out.exists()
    assert not worse.work.exists()
    with pytest.raises(OfflineError, match="ranks worse than"):
        tell(worse, verdict)
    printed = capsys.readouterr().out
    assert f"{np.mean(verdict.before.alone):.4f}" in printed
    assert f"{np.mean(verdict.after.alone):.4f}" in printed


def test_a_run_that_was_stopped_goes_on(tmp_path):
    """After a signal the same call begins where it was, although search proposes the candidates in another order."""
    begun = open_start(str(write_bert(tmp_path / "bert")))
    recipe = replace(recipe_for(begun, "collection c", seed=1), questions_per_step=1, short_tokens=32, long_tokens=32)
    plan = Plan(begun, tmp_path / "out", tmp_path / "work", 5.0, recipe, rounds=3, device="cpu", threads=1)
    lines: list[str] = []

    def stop_at_first_evaluation(line: str) -> None:
        lines.append(line)
        if "after step 200" in line:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="after step 200"):
        fine_tune(plan, gathered(), stop_at_first_evaluation)
    assert not plan.out.exists()
    other = gathered()
    for proposed in other.proposed:
        proposed.passages.reverse()
    assert other.key == gathered().key != gathered(turned=True).key
    fine_tune(plan, other, lines.append)
    assert any(line.startswith("goes on after step 200") for line in lines)
    assert any("after step 216" in line for line in lines)
    assert not plan.work.exists()


def test_the_settings_are_printed(tmp_path, capsys):
    """A model that is no worse is told with the two settings that serve it, and with what would rank better still."""
    begun = open_start("all-MiniLM-L6-v2")
    plan = Plan(begun, tmp_path / "my model", tmp_path, 1.0, recipe_for(begun, "c", seed=1))
    same = Ranked([0.5, 0.25], [0.5, 0.25])
    tell(plan, Verdict(same, same, [0.5, 0.0]))
    printed = capsys.readouterr().out
    assert f"RERANK_MODEL='{tmp_path}/my model' RERANK_FIRST_STAGE=late-interaction/all-MiniLM-L6-v2" in printed
    assert "rerank: false" not in printed
    tell(plan, Verdict(same, same, [0.5, 1.0]))
    assert "rerank: false" in capsys.readouterr().out


def test_worse_is_worse_in_either_way():
    """Alone or as search ranks; equal is not worse. The lines count the queries that changed."""
    good, bad = [1.0, 0.5, 0.5], [1.0, 0.25, 0.0]
    assert Verdict(Ranked(good, good), Ranked(good, bad), good).is_worse
    assert Verdict(Ranked(good, good), Ranked(bad, good), good).is_worse
    assert not Verdict(Ranked(good, good), Ranked(good, good), good).is_worse
    verdict = Verdict(Ranked(bad, good), Ranked(good, good), good)
    assert not verdict.is_worse
    assert "0.4167  0.6667   2, 0 (0.500)" in verdict.lines()[1]


def test_the_sign_test():
    """Twice the tail of a fair coin, 1 at most."""
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(1, 7) == sign_test(7, 1) == pytest.approx(2 * 9 / 256)


def test_the_same_queries_are_held_back_each_time(tmp_path):
    """A quarter, whatever the order of the file; a query that comes twice is one."""
    everything = read_judged(write_answers(tmp_path / "one.jsonl", judged()), None)
    turned = dict(reversed(judged().items())) | {next(iter(judged())).upper(): ["n9"]}
    other = read_judged(write_answers(tmp_path / "two.jsonl", turned), None)
    assert len(other) == len(everything) == QUERIES
    ours, theirs = divided(everything), divided(other)
    assert {one.query.lower() for one in ours.held_back} == {one.query.lower() for one in theirs.held_back}
    assert len(ours.held_back) == QUERIES // 4
    assert not {one.query for one in ours.held_back} & {one.query for one in ours.train}


def test_judgements_of_what_is_not_there_do_not_count():
    """A query without an answer left is left out; one that is judged to answer nothing too."""
    every = [Judged("a", {"x": 1, "gone": 2}), Judged("b", {"gone": 1}), Judged("c", {"x": 0})]
    assert known_only(every, ["x"]) == [Judged("a", {"x": 1})]
    with pytest.raises(DataError, match="at least 20"):
        divided(every)


def test_what_training_starts_from(tmp_path):
    """The default is in the package; a classifier with a head of its own is refused in words."""
    begun = open_start(default_start())
    assert begun.embedding_model == "all-MiniLM-L6-v2"
    assert recipe_for(begun, "c", seed=1).max_tokens == 256
    with pytest.raises(DataError, match="cannot be trained further"):
        open_start(str(write_classifier(tmp_path / "classifier")))
