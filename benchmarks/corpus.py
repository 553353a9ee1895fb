"""
A corpus of ~100 tokens a document with its real vectors, and distinct questions to it, from text that every machine carries.

The text is the documentation of the Python that runs (tercet.demo). It has some 260,000 words, so a document is made of
sentences of one module, drawn until it is long enough: each sentence is in many documents, and no two documents are alike.
The vectors are the real model's, made once by the embedding service and kept in build/.
"""

import base64
import http.client
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import ormsgpack
from numpy.typing import NDArray

from benchmarks.load import LoadFailed
from benchmarks.machine import ROOT
from benchmarks.servers import Running, ServerFailed, model_directory, running, tercet
from benchmarks.texts import MARKERS, model_token_counter
from tercet.demo.corpus import demo_documents

TOKENS = 100
KEPT = ROOT / "build" / "benchmarks" / "corpus"

_SENTENCE_ENDS = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*(])|\n\s*\n")
_FEWEST_WORDS = 4
_LEAST_TOKENS = 5  # What is left of a document is filled while it is more than this.
_QUESTION_WORDS = (5, 6, 7, 8)
_REPEATS_AT_THE_END = 10_000
_TEXTS_PER_REQUEST = 64
_REQUESTS_AT_ONCE = 3
_PATIENCE_S = 600.0
_SEED = 17


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts, and in the same order their unit vectors, float32 [n, dim], by the model of *fingerprint*."""

    texts: Sequence[str]
    vectors: NDArray[np.float32]
    model: str
    fingerprint: str

    def packed(self) -> Iterator[bytes]:
        """Yield the documents as MessagePack, one after the other, each with its vector; ids are row numbers."""
        for row, (text, vector) in enumerate(zip(self.texts, self.vectors, strict=True)):
            yield ormsgpack.packb({"id": str(row), "text": text, "metadata": {}, "vector": vector.tobytes()})


class Questions:
    """Distinct questions of 5 to 8 words, each a run of words of one sentence, the same ones in the same order each time."""

    def __init__(self, sentences: Sequence[str] | None = None) -> None:
        words = [sentence.split() for sentence in sentences or (one for group in _sentences() for one in group)]
        self._sentences = [sentence for sentence in words if len(sentence) >= _QUESTION_WORDS[-1]]
        self._draw = random.Random(f"{_SEED}/questions")
        self._asked: set[str] = set()

    def take(self, count: int) -> list[str]:
        """
        Return *count* questions that were not returned before; there are some 700,000 in all.

        Raises:
            LoadFailed: So many are not left.
        """
        taken: list[str] = []
        repeats = 0
        while len(taken) < count:
            words = self._draw.choice(self._sentences)
            length = self._draw.choice(_QUESTION_WORDS)
            start = self._draw.randrange(len(words) - length + 1)
            question = " ".join(words[start : start + length])
            repeats += 1
            if question not in self._asked:
                self._asked.add(question)
                taken.append(question)
                repeats = 0
            elif repeats == _REPEATS_AT_THE_END:
                raise LoadFailed(f"After {len(self._asked):,} questions there are hardly any others")
        return taken


def texts(count: int, tokens: int = TOKENS) -> list[str]:
    """Return the first *count* documents' texts of *tokens* tokens or a few less; fewer documents are a prefix of more."""
    count_tokens = model_token_counter(str(model_directory()))
    groups = [[(one, count_tokens(one) - MARKERS) for one in group] for group in _sentences()]
    draw = random.Random(f"{_SEED}/documents")
    weights = [len(group) for group in groups]
    made: dict[str, None] = {}
    while len(made) < count:
        for group in draw.choices(groups, weights, k=1000):
            made[_document(group, tokens - MARKERS, draw)] = None
    return list(islice(made, count))


def corpus(count: int, scratch: Path) -> Corpus:
    """Return *count* documents with their vectors: those kept from an earlier run, or made now, which takes minutes."""
    texts_file, vectors_file, about_file = (KEPT / name for name in ("texts.json", "vectors.npy", "about.json"))
    wanted = texts(count)
    if about_file.exists() and orjson.loads(texts_file.read_bytes())[:count] == wanted:
        about = orjson.loads(about_file.read_bytes())
        return Corpus(wanted, np.load(vectors_file, mmap_mode="r")[:count], about["model"], about["fingerprint"])
    print(f"Embedding {count:,} documents of {TOKENS} tokens, once; they are kept in {KEPT}", flush=True)
    with running([tercet(EMBEDDING_CACHE_BYTES="0")], scratch) as servers:
        server = next(iter(servers.values()))
        server.resume()
        made = _embedded(server, wanted)
    KEPT.mkdir(parents=True, exist_ok=True)
    texts_file.write_bytes(orjson.dumps(wanted))
    np.save(vectors_file, made.vectors)
    about_file.write_bytes(orjson.dumps({"model": made.model, "fingerprint": made.fingerprint}))
    return made


def _embedded(server: Running, wanted: Sequence[str]) -> Corpus:
    requests = [wanted[start : start + _TEXTS_PER_REQUEST] for start in range(0, len(wanted), _TEXTS_PER_REQUEST)]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        replies = list(pool.map(lambda inputs: _embed(server, inputs), requests))
    rows = [base64.b64decode(item["embedding"]) for reply in replies for item in reply["data"]]
    vectors = np.frombuffer(b"".join(rows), "<f4").reshape(len(wanted), -1).astype(np.float32)
    return Corpus(wanted, vectors, replies[0]["model"], replies[0]["fingerprint"])


def _embed(server: Running, inputs: Sequence[str]) -> dict[str, Any]:
    body = {"inputs": list(inputs), "input_type": "document", "lane": "bulk", "encoding": "base64"}
    connection = http.client.HTTPConnection(server.host, server.port, timeout=_PATIENCE_S)
    try:
        connection.request("POST", "/embed", orjson.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise ServerFailed(f"embedding the corpus failed with {reply.status}: {content[:300]!r}")
        answer: dict[str, Any] = orjson.loads(content)
        return answer
    finally:
        connection.close()


@cache
def _sentences() -> list[list[str]]:
    """Return the sentences of the documentation, by module, in the order that is the same each time."""
    groups: dict[str, list[str]] = defaultdict(list)
    for document in demo_documents():
        for found in _SENTENCE_ENDS.split(document["text"]):
            sentence = " ".join(found.split())
            if len(sentence.split()) >= _FEWEST_WORDS:
                groups[str(document["metadata"]["module"])].append(sentence)
    return list(groups.values())


def _document(group: Sequence[tuple[str, int]], tokens: int, draw: random.Random) -> str:
    """Return sentences of *group* in the order drawn, the last of them cut, that have *tokens* tokens or slightly less."""
    chosen, left = [], tokens
    while left > _LEAST_TOKENS:
        sentence, length = draw.choice(group)
        if length > left:
            words = sentence.split()
            sentence = " ".join(words[: max(1, len(words) * left // length)])
        chosen.append(sentence)
        left -= length
    return " ".join(chosen)
