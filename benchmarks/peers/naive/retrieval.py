"""Hybrid retrieval as a first attempt would have it: FAISS and Tantivy in memory, their ranks fused, behind FastAPI."""

import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import orjson
import tantivy
from fastapi import FastAPI
from pydantic import BaseModel

CANDIDATES = 100
RANK_CONSTANT = 60

app = FastAPI()


class Question(BaseModel):
    """The words, their vector, and how many documents to return."""

    query: str
    vector: list[float]
    limit: int


def _vectors(vectors: Any) -> Any:
    index: Any = faiss.index_factory(vectors.shape[1], "HNSW32,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    index.hnsw.efSearch = CANDIDATES
    return index


def _words(texts: list[str]) -> tantivy.Index:
    schema = tantivy.SchemaBuilder().add_text_field("text", tokenizer_name="en_stem")
    index = tantivy.Index(schema.add_unsigned_field("row", stored=True).build())
    writer = index.writer()
    for row, text in enumerate(texts):
        writer.add_document(tantivy.Document(text=text, row=row))
    writer.commit()
    index.reload()
    return index


directory, rows = Path(os.environ["CORPUS"]), int(os.environ["ROWS"])
texts: list[str] = orjson.loads((directory / "texts.json").read_bytes())[:rows]
by_vector = _vectors(np.ascontiguousarray(np.load(directory / "vectors.npy", mmap_mode="r")[:rows]))
by_words = _words(texts)


@app.get("/health")
def health() -> dict[str, str]:
    """Answer once the indexes are built."""
    return {"status": "ok"}


@app.post("/retrieve")
def retrieve(question: Question) -> dict[str, Any]:
    """Return the best documents by reciprocal rank fusion of both lists."""
    _, near = by_vector.search(np.array([question.vector], np.float32), CANDIDATES)
    searcher = by_words.searcher()
    query, _ = by_words.parse_query_lenient(question.query, ["text"])
    matching = [searcher.doc(place)["row"][0] for _, place in searcher.search(query, CANDIDATES, count=False).hits]
    scores: dict[int, float] = {}
    for ranked in (near[0].tolist(), matching):
        for rank, row in enumerate(ranked, start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
    best = sorted(scores, key=lambda row: -scores[row])[: question.limit]
    return {"hits": [{"id": str(row), "score": scores[row], "text": texts[row]} for row in best]}
