"""The naive orchestration that we stand beside: plain FastAPI over three services, in two forms (see peers/naive)."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson

from benchmarks import corpus
from benchmarks.servers import NAIVE, Running, ServerSpec, model_directory, running
from benchmarks.stack import EMBEDDING, RERANK, Stack, url

GLUE = "naive orchestration"
THROUGHOUT = "naive throughout"

_RETRIEVAL = "naive retrieval"


@contextmanager
def naive_stacks(rows: int, logs: Path, models: Mapping[str, Running]) -> Iterator[list[Stack]]:
    """
    Run both forms over the first *rows* documents of the kept corpus, and give them, paused.

    GLUE calls our own embedding and rerank services, *models*, as our pipeline does; THROUGHOUT embeds with
    sentence-transformers behind FastAPI. Both share one retrieval service.
    """
    specs = [
        _spec(_RETRIEVAL, "retrieval", CORPUS=str(corpus.KEPT), ROWS=str(rows)),
        _spec(NAIVE, "app", MODEL=str(model_directory())),
    ]
    with running(specs, logs) as leaves:
        retrieval, embedding = (leaves[spec.name] for spec in specs)
        shared = {"RETRIEVAL_URL": url(retrieval), "RERANK_URL": url(models[RERANK])}
        glue = _spec(GLUE, "search", **shared, EMBEDDING_URL=url(models[EMBEDDING]))
        throughout = _spec(THROUGHOUT, "search", **shared, EMBEDDING_URL=url(embedding), EMBEDDING_KIND="naive")
        with running([glue, throughout], logs) as fronts:
            first, second = fronts[GLUE], fronts[THROUGHOUT]
            yield [
                Stack(GLUE, first, [first, retrieval, *models.values()]),
                Stack(THROUGHOUT, second, [second, retrieval, embedding, models[RERANK]]),
            ]


def _spec(name: str, module: str, **environ: str) -> ServerSpec:
    app = f"benchmarks.peers.naive.{module}:app"
    return ServerSpec(
        name,
        command=lambda port: [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--no-access-log"],
        environ=lambda port: environ,
        ready_path="/health",
        path="/search",
        body=lambda texts, fields: orjson.dumps({"query": texts[0], **fields}),
    )
