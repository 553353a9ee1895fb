"""
The judged collections that searches are evaluated on.

Three have questions for tests. Of the sets that the shipped model is trained on, there are the questions about the articles
and diseases that training keeps back.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tercet.evaluation import load_beir
from tercet.ingest import DocumentDict
from training import data as training_data

TESTED = ("cranfield", "wikiqa", "scifact")
HELD_BACK = ("squad_dev", "medquad", "pubmedqa_l")
MOST_HELD_BACK = 400

_SEED = 23


@dataclass(frozen=True)
class JudgedSet:
    """Documents, queries by id, and the graded judgements of each query."""

    name: str
    documents: Sequence[DocumentDict]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of the documents."""
        return hashlib.sha256(json.dumps(self.documents, ensure_ascii=False).encode()).hexdigest()

    def first(self, count: int) -> "JudgedSet":
        """Return this set with only its first *count* queries."""
        queries = dict(list(self.queries.items())[:count])
        return replace(self, queries=queries, qrels={id_: self.qrels[id_] for id_ in queries})


def judged_sets(data: Path, names: Sequence[str]) -> list[JudgedSet]:
    """
    Return the sets *names* that are in the folder *data*; say which are not.

    Raises:
        DatasetError, DataError: A set's files are not what they should be.
    """
    found = []
    for name in names:
        if (data / name).is_dir():
            found.append(_reader(name)(name, data))
        else:
            print(f"{name} is left out: {data / name} is missing")
    return found


def _reader(name: str) -> Callable[[str, Path], JudgedSet]:
    return _tested if name in TESTED else _held_back


def _tested(name: str, data: Path) -> JudgedSet:
    beir = load_beir(data / name)
    return JudgedSet(name, list(beir.documents()), beir.queries, beir.qrels)


def _held_back(name: str, data: Path) -> JudgedSet:
    """Return the questions that training keeps back, a fixed sample where they are many, over all the set's passages."""
    collection = training_data.read(name, data)
    questions = collection.part("held-back")
    if len(questions) > MOST_HELD_BACK:
        chosen = sorted(random.Random(f"{_SEED}/{name}").sample(range(len(questions)), MOST_HELD_BACK))
        questions = [questions[at] for at in chosen]
    documents = []
    for passage in collection.passages:
        document = DocumentDict(id=passage.id, text=passage.text, metadata={})
        if passage.title:
            document["title"] = passage.title
        documents.append(document)
    queries = {str(number): question.text for number, question in enumerate(questions)}
    qrels = {
        str(number): {collection.passages[at].id: 1 for at in question.answers}
        for number, question in enumerate(questions)
    }
    return JudgedSet(name, documents, queries, qrels)
