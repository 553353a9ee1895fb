"""The whole run: read, prepare, train, ship, evaluate. Each part is kept on disk and not done again."""

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from sentence_transformers import CrossEncoder
from transformers.utils.logging import disable_progress_bar

from services.common.encoders import EncoderOptions, open_encoder
from services.common.encoders.hardware import usable_cores
from services.common.model_files import resolve_model
from training.calibration import brier, sigmoid
from training.candidates import Prepared, prepare
from training.data import TESTED, TRAINED, DataError, Part, available, read
from training.evaluate import AS_SEARCH_RANKS, MAIN_WAYS, MAXSIM_SHARE, Cascade, Scored, fit_cascade, ndcg, score_part
from training.lists import Lists, chosen_questions
from training.loop import Budget, Training
from training.model import new_student
from training.recipe import FIRST_STAGE, Recipe
from training.report import Outcome, card, results
from training.ship import CARD_FILE, load_shipped, weights_digest, write_cascade, write_shipped

Say = Callable[[str], None]

RESULTS_FILE = "RESULTS.md"
SHIPPED = "shipped"
FIXED_LISTS = 96


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What to do. *left_out* sets are not trained on; their held-back parts are evaluated on. *limit* takes only so many
    passages of each set, *most_judged* so many questions of each; 0 *threads* are all the cores. *prepared* is where
    candidates are kept, which other runs may share; *out* has all the rest.
    """

    data: Path
    out: Path
    prepared: Path
    recipe: Recipe
    budget: Budget
    embedding_model: str
    command: str
    device: str = "auto"
    threads: int = 0
    left_out: tuple[str, ...] = ()
    limit: int | None = None
    most_judged: int | None = None


def run(plan: Plan, say: Say) -> Outcome:
    """
    Make the model and its report; both are in *plan.out* then: `shipped` and `RESULTS.md`.

    Raises:
        Stopped: A signal ended the training; the same call goes on.
        DataError: A set is not what it should be.
        CannotShip: See `write_shipped`.
    """
    torch.set_num_threads(plan.threads or usable_cores())
    disable_progress_bar()
    device = chosen_device(plan.device)
    prepared = _prepare(plan, say)
    trained = [one for one in prepared if one.collection.name in TRAINED and one.collection.name not in plan.left_out]
    lists = Lists(trained, plan.recipe)
    if not len(lists):
        raise DataError(f"{plan.data}: no questions to train on")
    key = plan.recipe.key(plan.embedding_model, device, *[one.key for one in trained])
    say(f"{len(lists):,} lists a round of {', '.join(one.collection.name for one in trained)}; this run is {key}")
    student = new_student(
        resolve_model(plan.embedding_model), max_tokens=plan.recipe.max_tokens, seed=plan.recipe.seed, device=device
    )
    training = Training(student, lists, plan.recipe, checkpoint=plan.out / f"checkpoint-{key}.pt", key=key, say=say)
    with stopping(training, say):
        training.run(plan.budget, lists.fixed("held-back", FIXED_LISTS))
    say(f"trained: {training.progress.steps:,} steps, {training.progress.seconds / 60:.1f} min")
    shipped = plan.out / SHIPPED
    write_shipped(student, plan.embedding_model, shipped)
    # What ships is what is measured: weights rounded to bf16, made whole again.
    student = load_shipped(shipped, plan.out, device=device)
    outcome = _evaluate(plan, prepared, trained, student, training, weights_digest(shipped), say)
    write_cascade(shipped, outcome.cascade, first_stage=FIRST_STAGE, embedding_model=plan.embedding_model)
    (shipped / CARD_FILE).write_text(card(outcome), encoding="utf-8")
    (plan.out / RESULTS_FILE).write_text(results(outcome), encoding="utf-8")
    say(f"{shipped} ships; the figures are in {plan.out / RESULTS_FILE}")
    return outcome


def install(plan: Plan, outcome: Outcome, *, model: Path, report: Path) -> None:
    """
    Put the model and its report where the product has them.

    Raises:
        DataError: The cascade ranks the tests no better than retrieval does without it.
    """
    tests = [found for name, found in outcome.measured.items() if name in TESTED]
    gain = sum(found[AS_SEARCH_RANKS] - found["hybrid without rerank"] for found in tests)
    if not tests or gain <= 0:
        raise DataError("the model is not installed: it does not rank the tests better than retrieval alone does")
    shutil.rmtree(model, ignore_errors=True)
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(plan.out / SHIPPED, model)
    shutil.copyfile(Path(__file__).parents[1] / "LICENSE", model / "LICENSE")
    shutil.copyfile(plan.out / RESULTS_FILE, report)


def _prepare(plan: Plan, say: Say) -> list[Prepared]:
    names = available(plan.data)
    if not any(name in TRAINED and name != "python_docs" for name in names):
        raise DataError(f"{plan.data}: holds none of {', '.join(TRAINED[:-1])}")
    encoder = open_encoder(plan.embedding_model, EncoderOptions(threads=plan.threads))
    say(f"{plan.embedding_model}: {encoder.runtime} {encoder.precision}")
    try:
        made = []
        for name in names:
            if name in plan.left_out and name == "python_docs":
                continue
            collection = read(name, plan.data, limit=plan.limit)
            say(f"{name}: SHA-256 {collection.checksum[:16]}")
            made.append(prepare(collection, chosen_questions(collection, plan.recipe), encoder, plan.prepared, say))
        return made
    finally:
        encoder.close()


def _evaluate(
    plan: Plan,
    prepared: Sequence[Prepared],
    trained: Sequence[Prepared],
    student: CrossEncoder,
    training: Training,
    digest: str,
    say: Say,
) -> Outcome:
    scored: dict[str, list[Scored]] = {}
    for name, one, part in _judged(prepared):
        keep = plan.out / "logits" / f"{name.replace(', ', '-')}-{one.key}-{digest[:16]}-{plan.most_judged}.npy"
        found = score_part(one, part, student, plan.recipe, keep=keep, most=plan.most_judged)
        if found:
            scored[name] = found
            say(f"{name}: {len(found)} questions are scored")
    own = {f"{one.collection.name}, held back" for one in trained}
    fitted_on = [found for name, found in scored.items() if name in own]
    if not fitted_on:
        raise DataError(f"{plan.data}: no held-back questions to fit probabilities on")
    cascade = fit_cascade(fitted_on, maxsim_share=MAXSIM_SHARE)
    measured = {name: ndcg(found, cascade) for name, found in scored.items()}
    for name, by_way in measured.items():
        say(f"{name}: nDCG@10 " + ", ".join(f"{way} {by_way[way]:.4f}" for way in MAIN_WAYS))
    return Outcome(
        recipe=plan.recipe,
        command=f"{plan.command} --steps {training.progress.steps}",
        left_out=plan.left_out,
        collections=[one.collection for one in prepared],
        questions={one.collection.name: _count(one) for one in trained},
        steps=training.progress.steps,
        minutes=training.progress.seconds / 60,
        device=_words(chosen_device(plan.device), plan.threads),
        log=training.progress.log,
        measured=measured,
        judged={name: len(found) for name, found in scored.items()},
        calibration={name: _calibration(found, cascade) for name, found in scored.items()},
        cascade=cascade,
        digest=digest,
    )


def _judged(prepared: Sequence[Prepared]) -> Iterator[tuple[str, Prepared, Part]]:
    """Yield what is evaluated on, by name: the tests first, then the held-back parts of training sets."""
    by_name = {one.collection.name: one for one in prepared}
    for name in TESTED:
        if name in by_name:
            yield name, by_name[name], "test"
    for name, one in by_name.items():
        if name in TRAINED:
            yield f"{name}, held back", one, "held-back"


def _calibration(scored: Sequence[Scored], cascade: Cascade) -> tuple[float, float | None]:
    probabilities, labels = [], []
    for one in scored:
        probabilities += sigmoid(cascade.blended(one).astype(float)).tolist()
        labels += [float(int(at) in one.answers) for at in one.row.passages]
    sure = [label for probability, label in zip(probabilities, labels, strict=True) if probability >= 0.5]
    return brier(probabilities, labels), sum(sure) / len(sure) if sure else None


def _count(prepared: Prepared) -> int:
    return sum(question.part == "train" for question in prepared.questions)


def chosen_device(asked: str) -> str:
    """Return *asked*, or for `auto` what there is: `cuda` or `cpu`."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _words(device: str, threads: int) -> str:
    return f"{threads or usable_cores()} CPU cores" if device == "cpu" else torch.cuda.get_device_name(device)


@contextmanager
def stopping(training: Training, say: Say) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the training after the step that is being made."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        say(f"{signal.Signals(number).name}: stops after this step")
        training.stop.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
