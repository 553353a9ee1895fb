"""A user's judgements, and which of them are held back from training to measure with."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tercet.evaluation import load_judged
from training.data import DataError

LEAST_QUERIES = 20
HELD_BACK_SHARE = 0.25
_MOST_TRAINED, _MOST_HELD_BACK = 5000, 500


class Judged(NamedTuple):
    """A query and the documents that are judged for it, by id; a grade above 0 says that one answers it."""

    query: str
    grades: dict[str, int]

    @property
    def answers(self) -> list[str]:
        """The ids of the documents that answer it."""
        return [id_ for id_, grade in self.grades.items() if grade > 0]


class Parts(NamedTuple):
    """The queries that are trained on, and those that are measured with."""

    train: list[Judged]
    held_back: list[Judged]


def read_judged(place: Path, queries: Path | None) -> list[Judged]:
    """
    Read what `tercet.evaluation.load_judged` reads. Queries that differ in case and spaces only are one.

    Raises:
        DatasetError: It cannot be read.
    """
    texts, qrels = load_judged(place, queries=queries)
    found: dict[str, Judged] = {}
    for id_, text in texts.items():
        judged = found.setdefault(_normal(text), Judged(text.strip(), {}))
        for document, grade in qrels[id_].items():
            judged.grades[document] = max(grade, judged.grades.get(document, grade))
    return list(found.values())


def known_only(judged: Iterable[Judged], known: Iterable[str]) -> list[Judged]:
    """Return *judged* without judgements of other documents than *known*, and without queries that nothing answers then."""
    there = set(known)
    kept = [Judged(one.query, {id_: g for id_, g in one.grades.items() if id_ in there}) for one in judged]
    return [one for one in kept if one.answers]


def divided(judged: Sequence[Judged]) -> Parts:
    """
    Divide by query: a quarter is held back, the same queries each time.

    Raises:
        DataError: There are fewer than `LEAST_QUERIES`.
    """
    if len(judged) < LEAST_QUERIES:
        raise DataError(
            f"{len(judged)} judged queries have an answer in the collection: at least {LEAST_QUERIES} are needed to train"
            " on some and measure with others"
        )
    order = sorted(judged, key=lambda one: _place(one.query))
    # By place in the order, not by the hash itself: of few queries a quarter by chance may be none.
    count = round(len(order) * HELD_BACK_SHARE)
    return Parts(order[count:][:_MOST_TRAINED], order[:count][:_MOST_HELD_BACK])


def _normal(query: str) -> str:
    return " ".join(query.casefold().split())


def _place(query: str) -> bytes:
    return hashlib.blake2b(_normal(query).encode(), digest_size=8).digest()
