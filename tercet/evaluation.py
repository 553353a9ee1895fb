"""Ranking quality over judged collections in BEIR's layout: reading them, and the measures. Knows no service."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO, cast

import ir_measures
from ir_measures import RR, R, nDCG

from tercet.ingest import DocumentDict

MODES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense", "rerank": False},
    "lexical": {"mode": "lexical", "rerank": False},
    "hybrid": {"mode": "hybrid", "rerank": False},
    "hybrid + rerank": {"mode": "hybrid", "rerank": True},
}
MEASURES = (nDCG @ 10, R @ 100, RR @ 10)
MEASURE_NAMES = tuple(str(measure) for measure in MEASURES)
_QRELS = ("qrels.tsv", "qrels/test.tsv")
_QUERIES = ("queries.jsonl",)


class DatasetError(Exception):
    """The folder does not hold a judged collection; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """How many documents a corpus has, and a hash of its content that compression does not change."""

    documents: int
    digest: str


@dataclass(frozen=True)
class Beir:
    """
    A judged collection: queries by id, the graded judgements of each, and the file of its documents.

    Only queries that are judged are here, in the order of the queries' file.
    """

    folder: Path
    corpus: Path
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    def documents(self) -> Iterator[DocumentDict]:
        """Yield the documents; those without any text are left out, since nothing could find them."""
        for place, entry in _json_lines(self.corpus):
            text, title = _clean(entry.get("text") or ""), _clean(entry.get("title") or "")
            document = DocumentDict(id=_id(entry, place), text=text, metadata={})
            if title.strip():
                document["title"] = title
            if text.strip() or title.strip():
                yield document

    @cached_property
    def summary(self) -> CorpusSummary:
        """The corpus's size and hash, found by reading it once."""
        digest, ids = hashlib.sha256(), set()
        for document in self.documents():
            ids.add(document["id"])
            digest.update(json.dumps([document["id"], document.get("title"), document["text"]]).encode())
        return CorpusSummary(len(ids), digest.hexdigest())

    def first(self, count: int) -> "Beir":
        """Return this collection with only its first *count* queries."""
        kept = dict(list(self.queries.items())[:count])
        return Beir(self.folder, self.corpus, kept, {id_: self.qrels[id_] for id_ in kept})


def load_beir(folder: Path, *, qrels: Path | None = None) -> Beir:
    """
    Read the queries and judgements in *folder*: `corpus.jsonl`, `queries.jsonl`, and `qrels.tsv` or `qrels/test.tsv`.

    Each may be compressed, with `.gz` added to its name. The documents are left where they are.

    Raises:
        DatasetError: A file is missing or cannot be read as what it should be, or no query is judged.
    """
    judgements_file = qrels or _find(folder, _QRELS)
    queries_file = _find(folder, _QUERIES)
    corpus = _find(folder, ("corpus.jsonl",))
    return Beir(folder, corpus, *_read_judged(judgements_file, queries_file))


def load_judged(place: Path, *, queries: Path | None = None) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """
    Read queries by id, and the graded judgements of each; only queries that are judged are returned, in their order.

    *place* is a folder as `load_beir` reads it, whose documents are not needed; or a file of judgements like its
    `qrels.tsv`, with the file *queries*, else the `queries.jsonl` beside it; or lines of `{"query": …, "answers": [ids]}`
    in a file named `….jsonl`, whose answers have grade 1. Each file may be compressed, its name ending in `.gz`.

    Raises:
        DatasetError: A file is missing or cannot be read as what it should be, or no query is judged.
    """
    if place.name.removesuffix(".gz").endswith(".jsonl"):
        return _read_answers(place)
    judgements_file = _find(place, _QRELS) if place.is_dir() else place
    beside = place if place.is_dir() else place.parent
    return _read_judged(judgements_file, queries or _find(beside, _QUERIES))


def _read_judged(qrels: Path, queries: Path) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    if not qrels.is_file():
        raise DatasetError(f"{qrels}: no such file")
    judgements = _read_qrels(qrels)
    found = {}
    for place, entry in _json_lines(queries):
        id_, text = _id(entry, place), entry.get("text")
        if not isinstance(text, str):
            raise DatasetError(f"{place}: 'text' must be a string")
        if id_ in judgements and text.strip():
            found[id_] = _clean(text)
    if not found:
        raise DatasetError(f"none of the queries in {queries} is judged in {qrels}")
    return found, {id_: judgements[id_] for id_ in found}


def _read_answers(file: Path) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for place, entry in _json_lines(file):
        query, answers = entry.get("query"), entry.get("answers")
        if not isinstance(query, str) or not isinstance(answers, list):
            raise DatasetError(f"{place}: 'query' must be a string, and 'answers' a list of ids")
        if query.strip() and answers:
            id_ = str(len(queries))
            queries[id_] = _clean(query)
            qrels[id_] = {_id({"_id": answer}, place): 1 for answer in answers}
    if not queries:
        raise DatasetError(f"{file}: no query has an answer")
    return queries, qrels


def measure(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """
    Return nDCG@10, R@100 and RR@10, each the mean over the queries of *qrels*.

    *run* has the ids found for each query, best first; a query it lacks counts as one that found nothing.
    """
    # The measures order by score, and equal scores by id: ranks keep the order as it was.
    scored = {query: {id_: float(-rank) for rank, id_ in enumerate(ids)} for query, ids in run.items()}
    judged = {query: dict(grades) for query, grades in qrels.items()}
    found = ir_measures.calc_aggregate(list(MEASURES), judged, scored)
    return {str(name): float(value) for name, value in found.items()}


def _find(folder: Path, names: Iterable[str]) -> Path:
    candidates = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    raise DatasetError(f"{folder}: there is no {' or '.join(names)} in it, plain or .gz")


def _open(path: Path) -> TextIO:
    # newline: a stray carriage return or line separator inside a text is no end of line.
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", newline="\n"))
    return path.open(encoding="utf-8", newline="\n")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank with its place, for messages."""
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(entry, dict):
            raise DatasetError(f"{place}: not a JSON object")
        yield place, entry


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read `query<TAB>document<TAB>grade` lines, with or without a header line, or TREC's with its second column."""
    judgements: dict[str, dict[str, int]] = {}
    for number, (place, line) in enumerate(_lines(path)):
        fields = line.rstrip("\r\n").split("\t")
        fields = fields if len(fields) > 1 else line.split()
        try:
            query, document, grade = fields[0], fields[-2], int(fields[-1])
            if len(fields) not in (3, 4):
                raise ValueError
        except (ValueError, IndexError):
            if number == 0:
                continue  # the header
            raise DatasetError(f"{place}: not query, document and grade: {line.strip()[:80]!r}") from None
        judgements.setdefault(query, {})[document] = grade
    return judgements


def _id(entry: Mapping[str, Any], place: str) -> str:
    id_ = entry.get("_id", entry.get("id"))
    if isinstance(id_, bool) or not isinstance(id_, str | int) or not str(id_).strip():
        raise DatasetError(f"{place}: '_id' must be a string")
    return str(id_)


def _clean(text: str) -> str:
    """Replace what no service takes: null bytes and halves of surrogate pairs."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode()
