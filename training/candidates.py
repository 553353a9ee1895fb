"""
What retrieval proposes for each question, with the scores that the teacher mixes: dense cosine, BM25, MaxSim.

Made once for a collection and kept under a name that changes with anything that goes in.
"""

import hashlib
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tantivy
import torch
from numpy.typing import NDArray

from services.common.encoders import Encoder
from services.common.standardizing import standardized
from training.data import Collection, Question

Floats = NDArray[np.float32]
Say = Callable[[str], None]

DEPTH = 100
MAX_PASSAGE_TOKENS = 256
_MAX_QUESTION_TOKENS = 96
# Of a training question's candidates: the best of both retrievers', some of the rest, some of the whole collection.
_BEST, _OF_THE_REST, _OF_ALL = 28, 10, 2
_DENSE_WEIGHT = 0.65
_FORMAT = 2
_BATCH_TEXTS, _BATCH_TOKENS = 64, 4096
_BLOCK = 256
_TELL_EVERY = 2000
_MAX_TERMS = 64


class Row(NamedTuple):
    """One question's candidates (positions of passages, each once) and their scores; its answers are among them."""

    passages: NDArray[np.int32]
    dense: Floats
    bm25: Floats
    maxsim: Floats


@dataclass(frozen=True)
class Prepared:
    """A collection, all its questions (those made of passages too) and a row for each of them."""

    collection: Collection
    questions: tuple[Question, ...]
    rows: tuple[Row, ...]
    key: str


def prepare(
    collection: Collection, questions: Sequence[Question], encoder: Encoder, folder: Path, say: Say
) -> Prepared:
    """
    Return *questions* with their candidates, from *folder* where they are kept there, else made (minutes) and kept.

    Raises:
        OSError: They cannot be written to *folder*.
    """
    key = _key(collection, questions, encoder)
    file = folder / f"{collection.name}-{key}.npz"
    rows = _load(file)
    if rows is None:
        say(f"{collection.name}: {len(collection.passages)} passages, {len(questions)} questions: making candidates")
        rows = _Retrieval(collection, encoder, say).rows(questions)
        _save(file, rows)
    say(f"{collection.name}: candidates are in {file.name}")
    return Prepared(collection, tuple(questions), tuple(rows), key)


def hybrid(row: Row) -> Floats:
    """Return the scores of the product's retrieval without rerank: dense and BM25, standardised and added."""
    made: Floats = _DENSE_WEIGHT * standardized(row.dense) + (1 - _DENSE_WEIGHT) * standardized(row.bm25)
    return made


def _key(collection: Collection, questions: Sequence[Question], encoder: Encoder) -> str:
    digest = hashlib.sha256(collection.checksum.encode())
    digest.update(json.dumps(questions, ensure_ascii=False).encode())
    constants = [_FORMAT, DEPTH, MAX_PASSAGE_TOKENS, _MAX_QUESTION_TOKENS, _BEST, _OF_THE_REST, _OF_ALL, _DENSE_WEIGHT]
    digest.update(json.dumps([constants, encoder.description.digest]).encode())
    return digest.hexdigest()[:16]


class _Retrieval:
    """The passages of one collection, ready to be searched in both ways."""

    def __init__(self, collection: Collection, encoder: Encoder, say: Say) -> None:
        texts = [passage.whole for passage in collection.passages]
        self._say, self._name = say, collection.name
        self._encoder = encoder
        self._vectors, self._tokens = token_vectors(
            encoder, texts, MAX_PASSAGE_TOKENS, leave_out=encoder.tokenizer.punctuation()
        )
        say(f"{collection.name}: passages have vectors")
        self._words = Bm25(texts)
        self._open = np.array([at not in collection.closed for at in range(len(texts))])

    def rows(self, questions: Sequence[Question]) -> list[Row]:
        """Return a row for each of *questions*, in order."""
        vectors, tokens = token_vectors(self._encoder, [question.text for question in questions], _MAX_QUESTION_TOKENS)
        rows: list[Row] = []
        for start in range(0, len(questions), _BLOCK):
            cosines = vectors[start : start + _BLOCK] @ self._vectors.T
            for at, question in enumerate(questions[start : start + _BLOCK], start):
                rows.append(self._row(at, question, cosines[at - start], tokens.of(at)))
                if at % _TELL_EVERY == _TELL_EVERY - 1:
                    self._say(f"{self._name}: {at + 1} of {len(questions)} questions have candidates")
        return rows

    def _row(self, at: int, question: Question, cosines: Floats, tokens: torch.Tensor) -> Row:
        trained = question.part == "train"
        ranked = np.where(self._open, cosines, -np.inf) if trained else cosines
        depth = min(DEPTH, int(self._open.sum()) if trained else len(ranked))
        best = np.argpartition(-ranked, depth - 1)[:depth] if depth else np.zeros(0, np.int64)
        found = self._words.search(question.text, 2 * DEPTH if trained else DEPTH)
        words = dict([(p, score) for p, score in found.items() if not trained or self._open[p]][:DEPTH])
        passages = np.array(list(dict.fromkeys([*best.tolist(), *words, *question.answers])), np.int32)
        if trained:
            passages = self._chosen(at, question, passages, cosines, words)
        lexical = _lexical(passages, words)
        return Row(passages, cosines[passages].astype(np.float32), lexical, self._tokens.maxsim(tokens, passages))

    def _chosen(
        self, at: int, question: Question, passages: NDArray[np.int32], cosines: Floats, words: dict[int, float]
    ) -> NDArray[np.int32]:
        """Return the candidates that a training question keeps, its answers among them."""
        rng = random.Random(f"{self._name}/{at}")
        row = Row(passages, cosines[passages], _lexical(passages, words), np.zeros(0, np.float32))
        order = passages[np.argsort(-hybrid(row), kind="stable")].tolist()
        rest = order[_BEST:]
        kept = [*order[:_BEST], *rng.sample(rest, min(_OF_THE_REST, len(rest)))]
        everywhere = np.flatnonzero(self._open).tolist()
        kept += [rng.choice(everywhere) for _ in range(_OF_ALL)]
        return np.array(list(dict.fromkeys([*kept, *question.answers])), np.int32)


def _lexical(passages: NDArray[np.int32], words: dict[int, float]) -> Floats:
    """Return BM25 scores; a passage that BM25 did not find counts with the lowest score that it gave."""
    lowest = min(words.values(), default=0.0)
    return np.array([words.get(int(at), lowest) for at in passages], np.float32)


class TokenVectors:
    """The token vectors of many texts, of unit length, float16, one after the other."""

    def __init__(self, lengths: Sequence[int], dimensions: int) -> None:
        self._ends = np.concatenate([[0], np.cumsum([max(1, length) for length in lengths])])
        self._all = torch.zeros((int(self._ends[-1]), dimensions), dtype=torch.float16)

    def put(self, at: int, vectors: Floats) -> None:
        """Set the vectors of text *at*; a text without tokens keeps a zero, which is like nothing."""
        start = int(self._ends[at])
        self._all[start : start + len(vectors)] = torch.from_numpy(vectors)

    def of(self, at: int) -> torch.Tensor:
        """Return the vectors of text *at*."""
        return self._all[int(self._ends[at]) : int(self._ends[at + 1])]

    def maxsim(self, question: torch.Tensor, texts: NDArray[np.int32]) -> Floats:
        """Return, for each of *texts*, the mean over the question's tokens of the greatest cosine to one of its own."""
        if not len(texts):
            return np.zeros(0, np.float32)
        parts = [self.of(int(at)) for at in texts]
        cosines = (torch.cat(parts).float() @ question.float().T).numpy()
        starts = np.cumsum([0, *[len(part) for part in parts[:-1]]])
        made: Floats = np.maximum.reduceat(cosines, starts, axis=0).mean(axis=1).astype(np.float32)
        return made


def token_vectors(
    encoder: Encoder, texts: Sequence[str], max_tokens: int, *, leave_out: NDArray[np.int32] | None = None
) -> tuple[Floats, TokenVectors]:
    """
    Return unit vectors of *texts*, shape [len(texts), dim], and their tokens' without the special ones at both ends.

    Tokens of the ids *leave_out*, a document's punctuation, are left out too, unless a text has no others: so does
    the product's late interaction.

    A text's vector is the mean of its tokens', as the packaged embedding model pools.
    """
    tokens = encoder.tokenize(texts, max_tokens=max_tokens)
    lengths = [len(item.ids) for item in tokens]
    kept = [_kept(item.ids, leave_out) for item in tokens]
    order = sorted(range(len(texts)), key=lambda at: lengths[at])
    pooled: Floats = np.zeros((0, 0), np.float32)
    made: TokenVectors | None = None
    start = 0
    while start < len(order):
        fitting = _BATCH_TOKENS // max(1, lengths[order[min(start + _BATCH_TEXTS, len(order)) - 1]])
        batch = order[start : start + max(1, min(_BATCH_TEXTS, fitting))]
        start += len(batch)
        for at, vectors in zip(batch, encoder.per_token([tokens[at] for at in batch]), strict=True):
            if made is None:
                made = TokenVectors([len(each) for each in kept], vectors.shape[1])
                pooled = np.zeros((len(texts), vectors.shape[1]), np.float32)
            pooled[at] = _unit(vectors.mean(axis=0))
            made.put(at, _unit(vectors[kept[at]]))
    return pooled, made or TokenVectors([], 1)


def _kept(ids: Sequence[int], leave_out: NDArray[np.int32] | None) -> NDArray[np.int64]:
    """Return the places of the tokens that count."""
    places = np.arange(1, len(ids) - 1)
    if leave_out is None:
        return places
    words = places[~np.isin(np.array(ids, np.int64)[1:-1], leave_out)]
    return words if len(words) else places


def _unit(vectors: Floats) -> Floats:
    made: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return made


class Bm25:
    """Okapi BM25 over English stems, in memory, as the product's lexical search scores."""

    def __init__(self, texts: Sequence[str]) -> None:
        builder = tantivy.SchemaBuilder()
        builder.add_text_field("text", tokenizer_name="en_stem")
        builder.add_unsigned_field("position", stored=True, fast=True)
        self._schema = builder.build()
        index = tantivy.Index(self._schema)
        writer = index.writer(128_000_000, 1)
        for position, text in enumerate(texts):
            document = tantivy.Document()
            document.add_text("text", text)
            document.add_unsigned("position", position)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        self._searcher: Any = index.searcher()
        stems = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.lowercase())
        self._analyzer: Any = stems.filter(tantivy.Filter.stemmer("english")).build()

    def search(self, question: str, count: int) -> dict[int, float]:
        """Return the positions and scores of the *count* best texts that have a word of *question*, best first."""
        terms = list(dict.fromkeys(self._analyzer.analyze(question)))[:_MAX_TERMS]
        any_of = [(tantivy.Occur.Should, tantivy.Query.term_query(self._schema, "text", term)) for term in terms]
        hits = self._searcher.search(tantivy.Query.boolean_query(any_of), count).hits if terms else []
        return {self._searcher.doc(address)["position"][0]: score for score, address in hits}


def _save(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(row, name) for row in rows] or [[]]) for name in Row._fields
    }
    columns["sizes"] = np.array([len(row.passages) for row in rows], np.int64)
    descriptor, made = tempfile.mkstemp(prefix=".making-", suffix=".npz", dir=file.parent)
    with os.fdopen(descriptor, "wb") as stream:
        np.savez_compressed(stream, **columns)
    os.replace(made, file)


def _load(file: Path) -> list[Row] | None:
    try:
        with np.load(file) as kept:
            ends = np.cumsum(kept["sizes"])[:-1]
            columns = [np.split(kept[name], ends) for name in Row._fields]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # Damaged: made again.
    return [Row(p.astype(np.int32), d, b, m) for p, d, b, m in zip(*columns, strict=True)]
