"""
Search as a first attempt would have it: FastAPI that calls three services in sequence with httpx.

No deadline, no breaker, no cache. Embedding and rerank are the same services that our own pipeline calls or, with
EMBEDDING_KIND=naive, the naive embedding service beside this file; retrieval is `benchmarks.peers.naive.retrieval`.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel

EMBEDDING, RETRIEVAL, RERANK = (os.environ[f"{name}_URL"] for name in ("EMBEDDING", "RETRIEVAL", "RERANK"))
IS_NAIVE = os.environ.get("EMBEDDING_KIND") == "naive"
RERANKED = 30


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """Keep one client, so that connections are used again."""
    async with httpx.AsyncClient(timeout=60) as client:
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    """What is asked."""

    query: str
    k: int = 10
    rerank: bool = True


@app.get("/health")
def health() -> dict[str, str]:
    """Answer once the application runs."""
    return {"status": "ok"}


@app.post("/search")
async def search(question: Question, request: Request) -> dict[str, Any]:
    """Embed, retrieve and, if asked, rerank."""
    client: httpx.AsyncClient = request.state.client
    body: dict[str, Any] = (
        {"texts": [question.query]} if IS_NAIVE else {"inputs": question.query, "input_type": "query"}
    )
    made = await client.post(f"{EMBEDDING}/embed", json=body)
    made.raise_for_status()
    vector = made.json()["embeddings"][0] if IS_NAIVE else made.json()["data"][0]["embedding"]
    limit = RERANKED if question.rerank else question.k
    found = await client.post(f"{RETRIEVAL}/retrieve", json={"query": question.query, "vector": vector, "limit": limit})
    found.raise_for_status()
    hits = found.json()["hits"]
    if question.rerank:
        scored = await client.post(
            f"{RERANK}/rerank", json={"query": question.query, "documents": [hit["text"] for hit in hits]}
        )
        scored.raise_for_status()
        hits = [{**hits[each["index"]], "score": each["score"]} for each in scored.json()["results"]]
    return {"hits": hits[: question.k]}
