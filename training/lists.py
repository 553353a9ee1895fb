"""What one step of training reads: questions, a few candidates of each, and what the teacher says of them."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.candidates import Floats, Prepared
from training.data import Collection, Part, Question
from training.questions import made_questions, shown
from training.recipe import Recipe, Share
from training.teacher import Teacher

# More than the longest list of tokens holds; tokenising the rest would be for nothing.
_MAX_TEXT_CHARS = 1600
_HELD_BACK = 100
_ROUNDS_KEPT = 2
_DEFAULT_SHARE = Share(5000, 1)


class TrainingList(NamedTuple):
    """
    A question and texts to order. *targets* are logits; the first text is the answer.

    *known* says 1.0 of a text that is an answer, 0.0 of one that surely is none, and is not a number for the rest.
    """

    question: str
    texts: list[str]
    targets: Floats
    known: Floats


def chosen_questions(collection: Collection, recipe: Recipe) -> list[Question]:
    """Return the questions of *collection* to train and evaluate on, the made ones too, always in the same order."""
    share = recipe.real.get(collection.name, _DEFAULT_SHARE)
    trained = _some(collection.part("train"), share.most, collection.name)
    held_back = _some(collection.part("held-back"), _HELD_BACK, collection.name)
    return [*trained, *made_questions(collection), *held_back, *collection.part("test")]


def _some(questions: list[Question], most: int, name: str) -> list[Question]:
    return random.Random(f"some/{name}").sample(questions, min(most, len(questions)))


class Lists:
    """All training lists of some collections, by number: number n is the same each time, whatever was read before."""

    def __init__(self, prepared: Sequence[Prepared], recipe: Recipe) -> None:
        self._prepared = prepared
        self._recipe = recipe
        self._teachers = [Teacher(one, recipe) for one in prepared]
        self._round: list[tuple[int, int]] = []
        for which, one in enumerate(prepared):
            times = recipe.real.get(one.collection.name, _DEFAULT_SHARE).times
            for at, question in enumerate(one.questions):
                if question.part == "train":
                    self._round += [(which, at)] * (times if question.kind == "real" else 1)
        self._orders: dict[int, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        """Return how many lists one round has; after it comes another, in another order, with other candidates."""
        return len(self._round)

    def step(self, number: int) -> list[TrainingList]:
        """Return the lists of training step *number*."""
        count = self._recipe.questions_per_step
        return [self._visit(visit) for visit in range(number * count, (number + 1) * count)]

    def fixed(self, part: Part, most: int) -> list[TrainingList]:
        """Return up to *most* lists of real questions of another part, as many of each collection as of the others."""
        found = [
            (which, at)
            for which, one in enumerate(self._prepared)
            for at in [at for at, q in enumerate(one.questions) if q.part == part][: most // len(self._prepared)]
        ]
        return [self._list(which, at, random.Random(f"{part}/{which}/{at}")) for which, at in found]

    def _visit(self, visit: int) -> TrainingList:
        turn, place = divmod(visit, len(self._round))
        if turn not in self._orders:
            order = list(self._round)
            random.Random(f"{self._recipe.seed}/round/{turn}").shuffle(order)
            self._orders = {**dict(list(self._orders.items())[1 - _ROUNDS_KEPT :]), turn: order}
        which, at = self._orders[turn][place]
        return self._list(which, at, random.Random(f"{self._recipe.seed}/visit/{visit}"))

    def _list(self, which: int, at: int, rng: random.Random) -> TrainingList:
        recipe, one = self._recipe, self._prepared[which]
        question, row = one.questions[at], one.rows[at]
        passages = one.collection.passages
        scores = self._teachers[which].scores(row)
        answers = [k for k, passage in enumerate(row.passages) if int(passage) in question.answers]
        answer = rng.choice(answers)
        same = passages[int(row.passages[answer])].whole
        others = [
            int(k)
            for k in np.argsort(-scores, kind="stable")
            if int(k) not in answers and passages[int(row.passages[k])].whole != same
        ]
        hard = rng.sample(others[: recipe.hard_depth], min(recipe.hard, len(others)))
        rest = [k for k in others if k not in hard]
        far = [k for k in rest if k in set(others[recipe.hard_depth :])] or rest
        far = rng.sample(far, min(len(far), recipe.passages_per_question - 1 - len(hard)))
        chosen = [answer, *hard, *far]
        known = np.full(len(chosen), np.nan, np.float32)
        if question.kind != "keys":
            known[0] = 1.0
            known[1 + len(hard) :] = 0.0
        texts = [shown(passages[int(row.passages[k])], question)[:_MAX_TEXT_CHARS] for k in chosen]
        targets = self._teachers[which].targets(scores[chosen], 0, question.kind)
        return TrainingList(question.text, texts, targets, known)
