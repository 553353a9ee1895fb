"""The whole run over a tiny corpus: from files to a model that ships, its figures, and its calibration."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from sentence_transformers import CrossEncoder

from services.common.model_files import files_digest, resolve_model
from services.rerank.backends.late_interaction import FORM
from tests.tiny_models import write_bert
from tests.training_corpus import write_corpus
from training.calibration import brier, fit_sigmoid, sigmoid
from training.candidates import Row
from training.command import main
from training.data import DataError
from training.evaluate import AS_SEARCH_RANKS, Scored, fit_cascade, reciprocal_ranks
from training.loop import Budget
from training.recipe import FIRST_STAGE, Recipe
from training.run import Plan, install, run
from training.ship import MAX_BYTES

RECIPE = replace(Recipe(), questions_per_step=2, short_tokens=24, long_tokens=32, max_tokens=48, warmup_steps=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share two cores with others; a run sets how many threads it takes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run: its plan, what it found, and what it said."""
    place = tmp_path_factory.mktemp("run")
    plan = Plan(
        data=write_corpus(place / "data"),
        out=place / "out",
        prepared=place / "prepared",
        recipe=RECIPE,
        budget=Budget(steps=4),
        embedding_model=str(write_bert(place / "bert")),
        command="python -m training",
        threads=1,
        left_out=("python_docs",),
    )
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        outcome = run(plan, lines.append)
        yield plan, outcome, lines


def test_what_ships_is_small_and_loads_like_any_model(made):
    """The directory is under 25 MB, and made whole it is a CrossEncoder with one output."""
    plan, _, _ = made
    shipped = plan.out / "shipped"
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < MAX_BYTES
    model = CrossEncoder(str(resolve_model(str(shipped))), device="cpu")
    assert model.num_labels == 1
    assert model.max_seq_length == RECIPE.max_tokens
    (probability,) = model.predict([("river stone", "the river of stone")])
    assert 0.0 < probability < 1.0


def test_every_set_is_measured_on_what_was_not_trained_on(made):
    """Tests and held-back parts have an nDCG@10 for each way of ranking."""
    _, outcome, _ = made
    assert list(outcome.measured) == ["wikiqa", "scifact", "squad_dev, held back", "scifact, held back"]
    for found in outcome.measured.values():
        assert {"equal RRF", "hybrid without rerank", "MaxSim", "cross-encoder", "cascade"} <= set(found)
        assert all(0.0 <= value <= 1.0 for value in found.values())


def test_the_cascade_says_what_it_was_fitted_with(made):
    """cascade.json has the constants, the first stage's name, and the beginning of its fingerprint."""
    plan, outcome, _ = made
    values = json.loads((plan.out / "shipped" / "cascade.json").read_text())
    assert values["first_stage"] == FIRST_STAGE
    assert values["fingerprint"] == f"{FORM}:{files_digest(Path(plan.embedding_model))[:16]}"
    assert tuple(values["both"]) == outcome.cascade.both
    assert tuple(values["first"]) == outcome.cascade.first


def test_the_report_tells_how_to_make_it_again(made):
    """RESULTS.md has the command with the number of steps, each input's checksum, the log and the recipe."""
    plan, outcome, _ = made
    text = (plan.out / "RESULTS.md").read_text()
    assert "`python -m training --steps 4`" in text
    for collection in outcome.collections:
        assert collection.checksum[:16] in text
    assert "held-back lists after step 4" in text
    assert f"| sharpness | {RECIPE.sharpness} |" in text
    assert outcome.digest in text
    card = (plan.out / "shipped" / "README.md").read_text()
    assert "SQuAD" in card
    assert "MedQuAD" not in card


def test_the_same_run_again_makes_the_same_model(made):
    """Nothing is trained or scored twice in one place; in another place the weights are the same, bit for bit."""
    plan, outcome, _ = made
    again = run(plan, lambda line: None)
    elsewhere = run(replace(plan, out=plan.out.with_name("elsewhere")), lambda line: None)
    assert again.digest == elsewhere.digest == outcome.digest
    assert again.measured == elsewhere.measured == outcome.measured
    seeded = replace(plan, recipe=replace(RECIPE, seed=2), out=plan.out.with_name("seeded"))
    assert run(seeded, lambda line: None).digest != outcome.digest


def test_a_set_left_out_is_not_trained_on(made):
    """Its held-back part is still evaluated."""
    plan, _, _ = made
    left_out = ("python_docs", "scifact")
    outcome = run(replace(plan, left_out=left_out, out=plan.out.with_name("without")), lambda line: None)
    assert set(outcome.questions) == {"squad_dev"}
    assert "scifact, held back" in outcome.measured


def test_fewer_questions_are_judged_on_request(made):
    """With a limit, each set is measured on its first questions only, and the report says how many."""
    plan, _, _ = made
    outcome = run(replace(plan, most_judged=2, out=plan.out.with_name("judged")), lambda line: None)
    assert max(outcome.judged.values()) == 2
    assert "scifact (2)" in (plan.out.with_name("judged") / "RESULTS.md").read_text()


def test_a_worse_model_is_not_installed(made, tmp_path):
    """A model goes into the product only if it ranks the tests better than retrieval does without it."""
    plan, outcome, _ = made
    model, report = tmp_path / "models" / "reranker", tmp_path / "RESULTS.md"
    for gain in (0.0, -0.1):
        worse = {
            name: dict.fromkeys(found, 0.5) | {AS_SEARCH_RANKS: 0.5 + gain} for name, found in outcome.measured.items()
        }
        with pytest.raises(DataError, match="not installed"):
            install(plan, replace(outcome, measured=worse), model=model, report=report)
        assert not model.exists()
    better = {name: found | {AS_SEARCH_RANKS: 1.1} for name, found in outcome.measured.items()}
    install(plan, replace(outcome, measured=better), model=model, report=report)
    assert (model / "cascade.json").is_file()
    assert report.read_text() == (plan.out / "RESULTS.md").read_text()


def test_no_data_is_said_before_anything_is_loaded(made, tmp_path):
    """A directory without training sets is an error that names them."""
    plan, _, _ = made
    with pytest.raises(DataError, match="squad_dev"):
        run(replace(plan, data=tmp_path), lambda line: None)


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    """Without data, or beside another run in the same place, it ends with status 1 and a line that says why."""
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["training", "--data", str(tmp_path / "nothing"), "--out", str(out)])
    assert main() == 1
    assert "holds none of squad_dev" in capsys.readouterr().err
    with FileLock(out / ".lock"):
        assert main() == 1
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--judged"])
@pytest.mark.parametrize("given", ["0", "-1", "many", "²"])
def test_a_count_is_a_whole_number_from_one(option, given, monkeypatch, capsys):
    """Another value is refused by its option's name before anything is read."""
    monkeypatch.setattr(sys, "argv", ["training", "--data", "nothing", f"{option}={given}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{option}: '{given}' is no whole number from 1" in capsys.readouterr().err


def test_the_cascades_order_is_given_or_fitted():
    """With a share both scores count so by their usual spread, however much better one is; without, the better one decides."""
    rng = np.random.default_rng(2)
    questions = []
    for _ in range(200):
        maxsim, logits = rng.normal(0.7, 0.1, 30).astype(np.float32), rng.normal(0, 3.0, 30).astype(np.float32)
        best = frozenset({int(np.argmax(logits))})
        row = Row(np.arange(30), maxsim, maxsim, maxsim)
        questions.append(Scored(best, [], row, maxsim, maxsim, logits))
    equal, fitted = fit_cascade([questions], maxsim_share=0.5), fit_cascade([questions])
    assert equal.both[0] / equal.both[1] == pytest.approx(30.0, rel=0.05)
    assert abs(fitted.both[0] / fitted.both[1]) < 3.0
    assert equal.first == fitted.first
    for cascade in (equal, fitted):
        total = sum(float(sigmoid(cascade.blended(one).astype(float)).sum()) for one in questions)
        assert total == pytest.approx(len(questions), rel=0.01)


def test_platt_finds_the_constants_again():
    """Labels drawn from a sigmoid of two scores give its factors back; weights count."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(40_000, 2)) * [0.1, 3.0]
    truth = sigmoid(scores @ np.array([8.0, 0.5]) - 1.0)
    labels = (rng.random(len(truth)) < truth).astype(float)
    assert fit_sigmoid(scores, labels, np.ones(len(labels))) == pytest.approx([8.0, 0.5, -1.0], rel=0.1)
    only_first = np.where(np.arange(len(labels)) < 20_000, 1.0, 0.0)
    assert fit_sigmoid(scores, labels, only_first) == pytest.approx(
        fit_sigmoid(scores[:20_000], labels[:20_000], np.ones(20_000)), rel=1e-6
    )
    assert brier([1.0, 0.0], [1.0, 0.0]) == 0.0


def test_scores_that_divide_the_labels_perfectly_are_fitted_too():
    """The constants stay finite and right."""
    factor, constant = fit_sigmoid(np.array([[-1.0], [-0.9], [1.0]]), np.array([0.0, 0.0, 1.0]), np.ones(3))
    assert np.isfinite([factor, constant]).all()
    assert factor > 0


def test_reciprocal_ranks():
    """Equal RRF adds 1 / (60 + rank) of both retrievers: first and second is better than first and third."""
    row = Row(
        np.array([7, 8, 9, 6], np.int32),
        np.array([0.9, 0.5, 0.8, 0.1], np.float32),
        np.array([1.0, 2.0, 3.0, 0.5], np.float32),
        np.zeros(4, np.float32),
    )
    assert reciprocal_ranks(row) == [9, 7, 8, 6]
