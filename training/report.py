"""RESULTS.md, and the card that ships with the model."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

from training.data import TESTED, Collection
from training.evaluate import MAIN_WAYS, Cascade
from training.recipe import EMBEDDING_MODEL, Recipe

LICENCES = {
    "squad_dev": "SQuAD 1.1, development part (Rajpurkar et al., 2016): CC BY-SA 4.0",
    "medquad": "MedQuAD (Ben Abacha and Demner-Fushman, 2019): CC BY 4.0",
    "scifact": "SciFact, training part (Wadden et al., 2020): claims and evidence CC BY 4.0, abstracts ODC-By 1.0",
    "pubmedqa_l": "PubMedQA, labelled part (Jin et al., 2019): MIT",
    "python_docs": "Python's own documentation strings and language topics: PSF licence 2.0",
}
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "numpy", "tantivy", "openvino")
_MEAN_OF_TESTS, _MEAN_OF_ALL = "mean of the tests", "mean of all"


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What a run found out. *measured* has nDCG@10 by set, then by way of ranking; sets of *TESTED* come first.

    *calibration* has, for each set, the Brier score and what share of the candidates scored 0.5 or more are answers.
    """

    recipe: Recipe
    command: str
    left_out: tuple[str, ...]
    collections: Sequence[Collection]
    questions: Mapping[str, int]
    steps: int
    minutes: float
    device: str
    log: Sequence[str]
    measured: Mapping[str, Mapping[str, float]]
    judged: Mapping[str, int]
    calibration: Mapping[str, tuple[float, float | None]]
    cascade: Cascade
    digest: str


def results(outcome: Outcome) -> str:
    """Return RESULTS.md."""
    recipe = "\n".join(f"| {name} | {value} |" for name, value in asdict(outcome.recipe).items())
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    inputs = "\n".join(
        f"| {one.name} | {len(one.passages):,} | {outcome.questions.get(one.name, 0):,} | `{one.checksum[:16]}` |"
        for one in outcome.collections
    )
    log = "\n".join(f"    {line}" for line in outcome.log)
    left_out = f" Left out of training: {', '.join(outcome.left_out)}." if outcome.left_out else ""
    return f"""# What the training run found

Written by `python -m training`. To make the same model again: `{outcome.command}`

{outcome.steps:,} steps, {outcome.minutes:.1f} minutes of training on {outcome.device} ({platform.machine()}, Python \
{platform.python_version()}, {libraries}).{left_out} Weights: SHA-256 `{outcome.digest}`.

## nDCG@10

The 30 best candidates of dense + BM25, reordered; judged questions, as many as the brackets say, of sets that were not \
trained on, then of held-back parts of the training sets (other articles, diseases, abstracts). `teacher` is the mixture of \
MaxSim, dense and BM25; `cascade` is the sum of MaxSim and the cross-encoder's logit below.

{table(outcome.measured, outcome.judged)}

## Calibration

`cascade.json`: probability = sigmoid({_sum(outcome.cascade.both, ("MaxSim", "logit"))}), and without a logit \
sigmoid({_sum(outcome.cascade.first, ("MaxSim",))}); fitted on the held-back parts, with MaxSim and the logit in equal parts \
by their usual spread. The share is of the candidates with a probability of 0.5 or more that are answers.

| set | Brier score | share of answers |
|---|---|---|
{_calibration(outcome.calibration)}

## Log

{log}

## Inputs

| set | passages | training questions | SHA-256 |
|---|---|---|---|
{inputs}

## Recipe

| constant | value |
|---|---|
{recipe}
"""


def card(outcome: Outcome) -> str:
    """Return the model's card."""
    trained = [one.name for one in outcome.collections if outcome.questions.get(one.name)]
    data = "\n".join(f"* {LICENCES.get(name, name)}" for name in trained)
    return f"""---
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
pipeline_tag: text-ranking
library_name: sentence-transformers
language: en
---
# tercet-reranker

A small cross-encoder for English: how well does a passage answer a question? 6 layers, 384 dimensions, \
{outcome.recipe.max_tokens} tokens for question and passage together, one logit. It is made to work together with late \
interaction (MaxSim) over {EMBEDDING_MODEL}'s token vectors; `cascade.json` says how the two become one probability.

The word embeddings are those of {EMBEDDING_MODEL} and are not in this directory; `completion.json` names them. \
`tercet export --format sentence-transformers --model tercet-reranker --out DIR` writes a plain directory that \
`sentence_transformers.CrossEncoder` loads.

## Recipe

The transformer starts as {EMBEDDING_MODEL} (Apache 2.0). It learns, by KL divergence within lists of \
{outcome.recipe.passages_per_question} passages, the softmax of a mixture of MaxSim, dense and BM25 scores, raised where a \
passage is known to answer: {outcome.steps:,} steps of {outcome.recipe.questions_per_step} questions, \
{outcome.minutes:.0f} minutes on {outcome.device}. Questions are those of the sets below, and titles, sentences and key \
words cut from their passages. No MS MARCO.

## Data

Trained on, under these licences; none of the texts is in the model:

{data}

## Results

nDCG@10 over the 30 best candidates of dense + BM25; nothing here was trained on. All figures, the log and the command \
that makes the model again are in the source repository's `training/RESULTS.md`.

{table(outcome.measured, outcome.judged, MAIN_WAYS)}

## Limits

English only, and mostly encyclopaedic, medical, scientific and technical text. Alone it is weaker than late interaction \
on some sets; it is meant to be blended. A text longer than {outcome.recipe.max_tokens} tokens has to be read in windows. \
A logit of 0 has no meaning of its own: the probability from `cascade.json` has, for candidates like those it was fitted on.
"""


def table(
    measured: Mapping[str, Mapping[str, float]], judged: Mapping[str, int], shown: Sequence[str] | None = None
) -> str:
    """Return nDCG@10 as a table: a row for each way of ranking (of *shown*), a column for each set and two means."""
    tests = [name for name in measured if name in TESTED]
    heads = [*(f"{name} ({judged[name]})" for name in measured), _MEAN_OF_TESTS, _MEAN_OF_ALL]
    ways = list(dict.fromkeys(way for found in measured.values() for way in found))
    lines = [f"| ranked by | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for way in ways if shown is None else [way for way in ways if way in shown]:
        values = [found[way] for found in measured.values()]
        values += [_mean([measured[name][way] for name in tests]), _mean(values)]
        lines.append(f"| {way} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _sum(factors: Sequence[float], names: Sequence[str]) -> str:
    terms = [f"{factor:.4f}·{name}" for factor, name in zip(factors, names, strict=False)]
    return " + ".join([*terms, f"{factors[-1]:.4f}"]).replace("+ -", "- ")


def _calibration(calibration: Mapping[str, tuple[float, float | None]]) -> str:
    return "\n".join(
        f"| {name} | {brier:.4f} | {'none is that sure' if share is None else f'{share:.2f}'} |"
        for name, (brier, share) in calibration.items()
    )
