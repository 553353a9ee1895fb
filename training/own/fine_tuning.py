"""The whole run on a user's judgements: candidates, training, and a model that is written unless it is worse."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from transformers.utils.logging import disable_progress_bar

from services.common.encoders import Encoder, EncoderOptions, open_encoder
from services.common.encoders.hardware import usable_cores
from services.embedding.offline.output import new_directory
from training.candidates import Prepared
from training.evaluate import Cascade, Scored, fit_cascade, score_part
from training.lists import Lists
from training.loop import Budget, Training
from training.own.asking import Gathered
from training.own.rows import prepare
from training.own.starting import Start
from training.own.verdict import Verdict, ranked, without_rerank
from training.recipe import Recipe, Share
from training.run import FIXED_LISTS, SHIPPED, chosen_device, stopping
from training.ship import CARD_FILE, load_shipped, weights_digest, write_cascade, write_shipped

Say = Callable[[str], None]

# Runs are shorter than the shipped model's. What ranks already is changed with care.
_WARMUP_STEPS, _FURTHER_RATE = 30, 3e-5
_MOST_QUESTIONS, _TIMES_A_ROUND = 5000, 3
ROUNDS = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What to do: *rounds* over the questions or *minutes* of training, whichever are over first.

    *work* keeps what an interrupted run goes on from; it is removed at the end. 0 *threads* are all the cores.
    """

    start: Start
    out: Path
    work: Path
    minutes: float
    recipe: Recipe
    rounds: float = ROUNDS
    device: str = "auto"
    threads: int = 0


class _WhicheverFirst(Budget):
    """A budget of steps and of seconds."""

    def progress(self, steps: int, seconds: float) -> float:
        """Return the larger share that is spent."""
        return max(Budget(steps=self.steps).progress(steps, 0.0), Budget(seconds=self.seconds).progress(0, seconds))


def recipe_for(start: Start, collection: str, *, seed: int) -> Recipe:
    """Return how the questions of *collection* are taught to what begins as *start*."""
    most = start.most_tokens
    usual = Recipe()
    return replace(
        usual,
        seed=seed,
        learning_rate=_FURTHER_RATE if start.is_reranker else usual.learning_rate,
        warmup_steps=_WARMUP_STEPS,
        max_tokens=min(usual.max_tokens, most),
        long_tokens=min(usual.long_tokens, most),
        short_tokens=min(usual.short_tokens, most),
        real={collection: Share(_MOST_QUESTIONS, _TIMES_A_ROUND)},
    )


def fine_tune(plan: Plan, gathered: Gathered, say: Say) -> Verdict:
    """
    Train, measure on the held-back questions, and write the model to *plan.out* unless it is worse.

    Raises:
        Stopped: A signal ended the training; the same call goes on.
        DataError: The model to start from is of another kind.
        CannotShip: See `write_shipped`.
        OfflineError: *plan.out* cannot be written, or something is there.
    """
    torch.set_num_threads(plan.threads or usable_cores())
    disable_progress_bar()
    device = chosen_device(plan.device)
    prepared, encoder = _prepared(plan, gathered, say)
    student = plan.start.student(plan.recipe, device)
    say(f"{plan.start.name} ranks the held-back queries")
    before, cascade_before = _measured(plan, prepared, student, plan.recipe.key(plan.start.digest))
    lists = Lists([prepared], plan.recipe)
    steps = max(1, round(plan.rounds * len(lists) / plan.recipe.questions_per_step))
    say(f"{len(lists):,} lists a round, {steps:,} steps or {plan.minutes:g} minutes")
    key = plan.recipe.key(plan.start.digest, device, gathered.key)
    training = Training(student, lists, plan.recipe, checkpoint=plan.work / f"{key}.pt", key=key, say=say)
    with stopping(training, say):
        training.run(_WhicheverFirst(steps=steps, seconds=60 * plan.minutes), lists.fixed("held-back", FIXED_LISTS))
    made = plan.work / SHIPPED
    write_shipped(student, plan.start.embedding_model, made)
    say("the trained model ranks the held-back queries")
    # What is written is what is measured: rounded, and made whole again.
    student = load_shipped(made, plan.work, device=device)
    after, cascade = _measured(plan, prepared, student, weights_digest(made))
    grades = _held_back_grades(gathered)
    verdict = Verdict(
        ranked(before, grades, cascade_before), ranked(after, grades, cascade), without_rerank(after, grades)
    )
    if not verdict.is_worse:
        _write(plan, made, cascade, _card(plan, gathered, verdict, training))
    shutil.rmtree(plan.work, ignore_errors=True)
    del encoder  # Not before: once OpenVINO's graph is freed, a signal ends the process instead of the training.
    return verdict


def _prepared(plan: Plan, gathered: Gathered, say: Say) -> tuple[Prepared, Encoder]:
    """Return the questions with their candidates, and the encoder, which is closed."""
    encoder = open_encoder(plan.start.embedding_model, EncoderOptions(threads=plan.threads))
    try:
        return prepare(gathered, encoder, say), encoder
    finally:
        encoder.close()


def _measured(plan: Plan, prepared: Prepared, student: CrossEncoder, key: str) -> tuple[list[Scored], Cascade]:
    keep = plan.work / "logits" / f"{prepared.key}-{key[:16]}.npy"
    scored = score_part(prepared, "held-back", student, plan.recipe, keep=keep)
    return scored, fit_cascade([scored])


def _held_back_grades(gathered: Gathered) -> list[dict[int, int]]:
    real = zip(gathered.questions, gathered.grades, strict=False)  # Questions made of passages follow; they have none.
    return [grades for question, grades in real if question.part == "held-back"]


def _write(plan: Plan, made: Path, cascade: Cascade, card: str) -> None:
    start = plan.start
    write_cascade(made, cascade, first_stage=start.first_stage_name, embedding_model=start.embedding_model)
    (made / CARD_FILE).write_text(card, encoding="utf-8")
    with new_directory(plan.out, force=False) as place:
        shutil.copytree(made, place, dirs_exist_ok=True)


def _card(plan: Plan, gathered: Gathered, verdict: Verdict, training: Training) -> str:
    """Return the model's card."""
    trained = sum(question.part == "train" for question in gathered.questions)
    figures = "\n".join(f"    {line}" for line in verdict.lines())
    return f"""---
base_model: {plan.start.name}
pipeline_tag: text-ranking
library_name: sentence-transformers
---
# A reranker trained by `tercet train-reranker`

From {plan.start.name}, {training.progress.steps:,} steps of {plan.recipe.questions_per_step} questions \
({trained:,} different ones) of the {gathered.collection.name}. `cascade.json` says how its logit and MaxSim over \
{plan.start.embedding_model}'s token vectors become one probability. The word embeddings are {plan.start.embedding_model}'s \
and are not in this directory; `tercet export --format sentence-transformers --model DIR --out PLACE` writes a plain one.

{figures}
"""
