"""What is read of the user's collection, over HTTP: the judged documents, and what search proposes for each question."""

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.common.wire.search import Hit
from tercet.client import TercetClient
from tercet.errors import TercetApiError
from training.data import Collection, DataError, Part, Passage, Question
from training.own.judgements import Judged, Parts, divided, known_only
from training.questions import made_questions

Say = Callable[[str], None]

PROPOSED = 60
_MADE_MOST = 1500
_READ_AT_ONCE, _ASKED_AT_ONCE = 8, 8
# The student reads less of a text than this.
_MAX_TEXT_CHARS = 4000
_MAX_QUERY_CHARS = 8000
_TIMEOUT_MS = 60_000
# Candidates of a stage down would teach something else.
_WHOLE = {"dense": True, "lexical": True, "all_shards": True}


class Proposed:
    """What search proposes for a question: positions of passages, best first; *bm25* is of those that have its words."""

    def __init__(self) -> None:
        self.passages: list[int] = []
        self.bm25: dict[int, float] = {}


@dataclass(frozen=True)
class Gathered:
    """
    All that is trained and measured with; *proposed* and *grades* are by the question's place in *questions*.

    Real questions come first, those of training before those held back, then questions made of passages. *grades* has
    the judged passages of real ones, by position. Closed passages, answers of held-back questions only, are not trained on.
    """

    collection: Collection
    questions: list[Question]
    proposed: list[Proposed]
    grades: list[dict[int, int]]

    @property
    def key(self) -> str:
        """A checksum of the collection's name and of the judgements: what search proposes may differ from time to time."""
        judged = [
            [
                question.text,
                question.part,
                sorted((self.collection.passages[at].id, grade) for at, grade in grades.items()),
            ]
            for question, grades in zip(self.questions, self.grades, strict=False)  # Those made of passages follow.
        ]
        return hashlib.sha256(json.dumps([self.collection.name, judged]).encode()).hexdigest()


async def gather(
    client: TercetClient, name: str, judged: Sequence[Judged], say: Say, *, made_most: int = _MADE_MOST
) -> Gathered:
    """
    Read from the collection *name* what training on *judged* needs; *made_most* questions are cut from its passages.

    Raises:
        DataError: Too few of the judged documents are there, or a search failed.
        TercetClientError: The service did not answer.
    """
    library = _Library(client, name)
    say(f"reading {len({id_ for one in judged for id_ in one.grades}):,} judged documents")
    await library.read(dict.fromkeys(id_ for one in judged for id_ in one.grades))
    parts = divided(known_only(judged, library.positions))
    left_out = len(judged) - len(parts.train) - len(parts.held_back)
    say(
        f"{len(parts.train)} queries to train on, {len(parts.held_back)} held back"
        + (f", {left_out} left out: no answer of theirs is in the collection" if left_out else "")
    )
    real, grades, closed = _questions(parts, library)
    proposed = await library.propose([question.text for question in real], say)
    seen = Collection(f"collection {name}", tuple(library.passages), tuple(real), closed)
    made = made_questions(seen)
    made = random.Random("made").sample(made, min(made_most, len(made)))
    say(f"{len(made)} more questions are cut from passages")
    proposed += await library.propose([question.text for question in made], say)
    whole = Collection(seen.name, tuple(library.passages), tuple(real), closed)
    return Gathered(whole, [*real, *made], proposed, grades)


def _questions(parts: Parts, library: "_Library") -> tuple[list[Question], list[dict[int, int]], frozenset[int]]:
    """Return the real questions, their grades by position, and the closed passages."""
    questions, grades = [], []
    named: list[tuple[Part, list[Judged]]] = [("train", parts.train), ("held-back", parts.held_back)]
    for part, chosen in named:
        for one in chosen:
            answers = tuple(library.positions[id_] for id_ in one.answers)
            questions.append(Question(one.query[:_MAX_QUERY_CHARS], answers, "real", part))
            grades.append({library.positions[id_]: grade for id_, grade in one.grades.items()})
    trained = {at for question in questions if question.part == "train" for at in question.answers}
    asked = {at for question in questions if question.part == "held-back" for at in question.answers}
    return questions, grades, frozenset(asked - trained)


class _Library:
    """The passages that were read so far."""

    def __init__(self, client: TercetClient, collection: str) -> None:
        self._client, self._collection = client, collection
        self.passages: list[Passage] = []
        self.positions: dict[str, int] = {}

    async def read(self, ids: Sequence[str] | dict[str, None]) -> None:
        """Read documents by id; those that are not there are left out."""
        await self._client.collection(self._collection)
        places = asyncio.Semaphore(_READ_AT_ONCE)

        async def one(id_: str) -> tuple[str, str | None, str] | None:
            async with places:
                try:
                    found = await self._client.get_document(self._collection, id_)
                except TercetApiError as error:
                    if error.status in (404, 422):  # A string that is no id is none of a document.
                        return None
                    raise
                return found.id, found.title, found.text

        for document in await asyncio.gather(*(one(id_) for id_ in ids)):
            if document is not None:
                self._position(*document)

    async def propose(self, questions: Sequence[str], say: Say) -> list[Proposed]:
        """Return what search proposes for each of *questions*, in order."""
        made: list[Proposed] = []
        for start in range(0, len(questions), _ASKED_AT_ONCE):
            made += await self._search(questions[start : start + _ASKED_AT_ONCE])
            if start % 400 == 400 - _ASKED_AT_ONCE:
                say(f"{len(made)} of {len(questions)} questions are searched for")
        return made

    async def _search(self, questions: Sequence[str]) -> list[Proposed]:
        fields = {
            "collection": self._collection,
            "k": PROPOSED,
            "rerank": False,
            "cache": False,
            "include": ["text"],
            "timeout_ms": _TIMEOUT_MS,
            "require": _WHOLE,
        }
        reply = await self._client.search_batch([{"query": question, **fields} for question in questions])
        made = []
        for question, result in zip(questions, reply.results, strict=True):
            if result.answer is None:
                why = result.error.message if result.error else "no answer"
                raise DataError(f"the search for {question[:80]!r} failed: {why}")
            made.append(self._proposed(result.answer.hits))
        return made

    def _proposed(self, hits: Sequence[Hit]) -> Proposed:
        made = Proposed()
        for hit in hits:
            at = self._position(hit.id, hit.title, hit.text or "")
            made.passages.append(at)
            if hit.stages.bm25 is not None:
                made.bm25[at] = hit.stages.bm25
        return made

    def _position(self, id_: str, title: str | None, text: str) -> int:
        if id_ not in self.positions:
            self.positions[id_] = len(self.passages)
            self.passages.append(Passage(id_, title or "", text[:_MAX_TEXT_CHARS], id_))
        return self.positions[id_]
