"""sentence-transformers behind FastAPI in a dozen lines, as a first attempt would have it; our own environment runs it."""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(os.environ["MODEL"])


class Request(BaseModel):
    """The texts to embed."""

    texts: list[str]


@app.get("/health")
def health() -> dict[str, str]:
    """Answer once the model is loaded."""
    return {"status": "ok"}


@app.post("/embed")
def embed(request: Request) -> dict[str, list[list[float]]]:
    """Return one vector per text, in order."""
    return {"embeddings": model.encode(request.texts).tolist()}
