"""The candidates of a user's questions with the scores that the teacher mixes, from what search proposed."""

import hashlib
import random
from collections.abc import Callable, Iterator

import numpy as np

from services.common.encoders import Encoder
from training.candidates import MAX_PASSAGE_TOKENS, Floats, Prepared, Row, token_vectors
from training.own.asking import Gathered

Say = Callable[[str], None]

_MAX_QUESTION_TOKENS = 96
# Of what search proposes for a training question: the best, and some of the rest; and some of the whole collection.
_BEST, _OF_THE_REST, _OF_ALL = 28, 10, 2
# Token vectors of about so many passages are in memory at once: half a gigabyte.
_MOST_PASSAGES = 4000


def prepare(gathered: Gathered, encoder: Encoder, say: Say) -> Prepared:
    """
    Return the questions of *gathered* with a row for each of them: what search proposed, judged passages and answers.

    Dense scores are cosines of *encoder*'s vectors, BM25's are the service's; the same input gives the same rows.
    """
    rows: list[Row] = []
    for block in _blocks([_chosen(gathered, at) for at in range(len(gathered.questions))]):
        rows += _rows(gathered, len(rows), block, encoder)
        say(f"{len(rows)} of {len(gathered.questions)} questions have candidates")
    digest = hashlib.sha256(f"{gathered.collection.checksum} {encoder.description.digest}".encode())
    for question, row in zip(gathered.questions, rows, strict=True):
        digest.update(repr(question).encode())
        for column in row:
            digest.update(column.tobytes())
    return Prepared(gathered.collection, tuple(gathered.questions), tuple(rows), digest.hexdigest()[:16])


def _blocks(chosen: list[list[int]]) -> Iterator[list[list[int]]]:
    """Yield *chosen* in pieces that have about `_MOST_PASSAGES` different passages."""
    block: list[list[int]] = []
    used: set[int] = set()
    for passages in chosen:
        block.append(passages)
        used.update(passages)
        if len(used) >= _MOST_PASSAGES:
            yield block
            block, used = [], set()
    if block:
        yield block


def _rows(gathered: Gathered, start: int, chosen: list[list[int]], encoder: Encoder) -> list[Row]:
    """Return the rows of the questions from *start* on whose candidates are *chosen*."""
    questions = gathered.questions[start : start + len(chosen)]
    used = sorted({at for passages in chosen for at in passages})
    places = {at: place for place, at in enumerate(used)}
    vectors, tokens = token_vectors(
        encoder,
        [gathered.collection.passages[at].whole for at in used],
        MAX_PASSAGE_TOKENS,
        leave_out=encoder.tokenizer.punctuation(),
    )
    asked, words = token_vectors(encoder, [question.text for question in questions], _MAX_QUESTION_TOKENS)
    rows = []
    for at, passages in enumerate(chosen):
        inside = np.array([places[passage] for passage in passages], np.int32)
        dense: Floats = (vectors[inside] @ asked[at]).astype(np.float32)
        lexical = _lexical(passages, gathered.proposed[start + at].bm25)
        rows.append(Row(np.array(passages, np.int32), dense, lexical, tokens.maxsim(words.of(at), inside)))
    return rows


def _chosen(gathered: Gathered, at: int) -> list[int]:
    """Return the passages that are candidates of question *at*; of a held-back one all that search proposed."""
    question, found = gathered.questions[at], gathered.proposed[at].passages
    if question.part != "train":
        return list(dict.fromkeys([*found, *question.answers]))
    rng = random.Random(f"own/{at}")
    closed, judged = gathered.collection.closed, gathered.grades[at] if at < len(gathered.grades) else {}
    open_ = [passage for passage in found if passage not in closed]
    rest = open_[_BEST:]
    kept = [*open_[:_BEST], *judged, *rng.sample(rest, min(_OF_THE_REST, len(rest)))]
    kept += [rng.randrange(len(gathered.collection.passages)) for _ in range(_OF_ALL)]
    return list(dict.fromkeys([passage for passage in [*kept, *question.answers] if passage not in closed]))


def _lexical(passages: list[int], bm25: dict[int, float]) -> Floats:
    """Return BM25 scores; a passage without any of the words counts with the lowest score there is."""
    lowest = min(bm25.values(), default=0.0)
    return np.array([bm25.get(at, lowest) for at in passages], np.float32)
