"""
The collections that are trained and evaluated on: passages, questions with their answers, and which part each is in.

Parts are divided by document or article, so that no topic of a held-back question is seen in training.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from services.search.documents import model_text
from tercet.demo.corpus import demo_documents
from tercet.demo.questions import load_questions
from tercet.evaluation import DatasetError, load_beir

Kind = Literal["real", "title", "sentence", "keys"]
Part = Literal["train", "held-back", "test"]

TRAINED = ("squad_dev", "medquad", "scifact", "pubmedqa_l", "python_docs")
TESTED = ("wikiqa", "scifact", "cranfield")
HELD_BACK_SHARE = 0.1
# Of medquad's 15,809 passages as many diseases as give about these: more than an hour of training reads.
_MEDQUAD_PASSAGES = 5500
_PYTHON_MIN_WORDS = 25
_PYTHON_PASSAGES = 3000


class DataError(Exception):
    """A set is not there or is not what it should be; the message names the file."""


class Passage(NamedTuple):
    """A text to be found. Passages of one *group* (an article, a disease, a module) are in the same part."""

    id: str
    title: str
    text: str
    group: str

    @property
    def whole(self) -> str:
        """What the product's models read: the title, unless the text begins with it, then the text."""
        return model_text(self.title, self.text)


class Question(NamedTuple):
    """A question; *answers* are the positions of the passages that answer it, which may be none."""

    text: str
    answers: tuple[int, ...]
    kind: Kind
    part: Part


@dataclass(frozen=True)
class Collection:
    """
    Passages, and the real questions about them in the order of the files.

    *closed* are the positions of passages that training sees neither as an answer, nor as a wrong one, nor as the
    source of a question.
    """

    name: str
    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]
    closed: frozenset[int]

    @cached_property
    def checksum(self) -> str:
        """A SHA-256 over all that is here."""
        digest = hashlib.sha256(self.name.encode())
        for part in (self.passages, self.questions, sorted(self.closed)):
            digest.update(json.dumps(part, ensure_ascii=False).encode())
        return digest.hexdigest()

    def part(self, part: Part) -> list[Question]:
        """Return the questions of one part, in order."""
        return [question for question in self.questions if question.part == part]


def is_held_back(name: str, group: str) -> bool:
    """Say whether *group* of the training set *name* is kept from training: about a tenth are, the same each time."""
    return _fraction(f"held back/{name}/{group}") < HELD_BACK_SHARE


def read(name: str, data: Path, *, limit: int | None = None) -> Collection:
    """
    Read the collection *name* from the directory *data*; *limit* takes only about so many of its passages.

    Raises:
        DataError: A file is missing, or not what it should be.
    """
    readers = {"wikiqa": _judged, "cranfield": _judged, "scifact": _scifact, "python_docs": _python_docs}
    try:
        collection = readers.get(name, _paired)(name, data)
    except (DatasetError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{data / name}: {type(error).__name__}: {error}") from error
    return collection if limit is None else _limited(collection, limit)


def available(data: Path) -> list[str]:
    """Return the names of the known sets that are in *data*, and of the one that every machine carries."""
    return [name for name in dict.fromkeys((*TRAINED, *TESTED)) if name == "python_docs" or (data / name).is_dir()]


def _paired(name: str, data: Path) -> Collection:
    """Read a set of questions, each with the passages that answer it."""
    passages = list(_passages(data / name / "passages.jsonl.gz"))
    if name == "medquad":
        passages = _some_groups(name, passages, _MEDQUAD_PASSAGES)
    closed = frozenset(at for at, passage in enumerate(passages) if is_held_back(name, passage.group))
    return Collection(name, tuple(passages), tuple(_questions(data / name, passages, closed)), closed)


def _scifact(name: str, data: Path) -> Collection:
    """Read scifact, whose passages serve both parts: those that the test judges are closed to training."""
    judged = _judged(name, data)
    tested = {answer for question in judged.questions for answer in question.answers}
    held_back = {at for at, passage in enumerate(judged.passages) if is_held_back(name, passage.group)}
    closed = frozenset(tested | held_back)
    asked = {_normal(question.text) for question in judged.questions}
    own = [q for q in _questions(data / name, list(judged.passages), closed) if _normal(q.text) not in asked]
    return Collection(name, judged.passages, (*own, *judged.questions), closed)


def _judged(name: str, data: Path) -> Collection:
    """Read a set in BEIR's layout, to be tested on only."""
    beir = load_beir(data / name)
    passages = tuple(
        Passage(document["id"], document.get("title", ""), document["text"], document["id"])
        for document in beir.documents()
    )
    positions = {passage.id: at for at, passage in enumerate(passages)}
    questions = []
    for id_, text in beir.queries.items():
        graded = beir.qrels[id_].items()
        # A judged document without any text is in no index.
        answers = tuple(positions[found] for found, grade in graded if grade > 0 and found in positions)
        if answers:
            questions.append(Question(text, answers, "real", "test"))
    return Collection(name, passages, tuple(questions), frozenset(range(len(passages))))


def _python_docs(name: str, data: Path) -> Collection:
    """
    Read the documentation of the Python that runs: text without questions.

    What answers the demo's questions is left out, so that those still say something.
    """
    del data
    answers = {answer for question in load_questions() for answer in question.answers}
    passages = []
    for document in demo_documents():
        whole = document["id"].partition("#")[0]
        if whole not in answers and len(document["text"].split()) >= _PYTHON_MIN_WORDS:
            group = str(document["metadata"]["module"])
            passages.append(Passage(document["id"], document.get("title", ""), document["text"], group))
    passages = _some_groups(name, passages, _PYTHON_PASSAGES)
    closed = frozenset(at for at, passage in enumerate(passages) if is_held_back(name, passage.group))
    return Collection(name, tuple(passages), (), closed)


def _questions(folder: Path, passages: list[Passage], closed: Iterable[int]) -> Iterator[Question]:
    """
    Yield each distinct question of *folder*'s pairs once, with all its answers.

    A question with an answer that is closed belongs to the held-back part.
    """
    positions = {passage.id: at for at, passage in enumerate(passages)}
    shut = frozenset(closed)
    texts: dict[str, str] = {}
    answers: dict[str, dict[int, None]] = {}
    for pair in _lines(folder / "pairs.jsonl.gz"):
        at = positions.get(pair["passage_id"])
        if at is not None:
            key = _normal(pair["query"])
            texts.setdefault(key, pair["query"].strip())
            answers.setdefault(key, {})[at] = None
    for key, text in texts.items():
        found = tuple(answers[key])
        yield Question(text, found, "real", "held-back" if shut.intersection(found) else "train")


def _passages(file: Path) -> Iterator[Passage]:
    for entry in _lines(file):
        title, text = (entry.get("title") or "").strip(), (entry.get("text") or "").strip()
        if title or text:
            yield Passage(str(entry["_id"]), title, text, title or str(entry["_id"]))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _some_groups(name: str, passages: list[Passage], most: int) -> list[Passage]:
    """Return all the passages of some groups, *most* at most, in the order they came."""
    sizes: dict[str, int] = {}
    for passage in passages:
        sizes[passage.group] = sizes.get(passage.group, 0) + 1
    kept, total = set(), 0
    for group in sorted(sizes, key=lambda group: _fraction(f"some of/{name}/{group}")):
        if total + sizes[group] > most:
            continue
        kept.add(group)
        total += sizes[group]
    return [passage for passage in passages if passage.group in kept]


def _limited(collection: Collection, limit: int) -> Collection:
    """Return *collection* with its first questions of each part, their answers, and other passages up to *limit*."""
    questions = [q for part in ("train", "held-back", "test") for q in collection.part(part)[: max(1, limit // 10)]]
    wanted = dict.fromkeys(answer for question in questions for answer in question.answers)
    kept = sorted([*wanted, *[at for at in range(len(collection.passages)) if at not in wanted][:limit]])
    moved = {old: new for new, old in enumerate(kept)}
    return Collection(
        collection.name,
        tuple(collection.passages[at] for at in kept),
        tuple(q._replace(answers=tuple(moved[answer] for answer in q.answers)) for q in questions),
        frozenset(moved[at] for at in collection.closed if at in moved),
    )


def _normal(question: str) -> str:
    return " ".join(question.casefold().split())


def _fraction(name: str) -> float:
    """Return a number from 0 to 1 that stands for *name*."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
