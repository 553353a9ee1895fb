"""
Reranking without HTTP, in a process of its own: by the library (`predict`, fp32), and by our own backend called directly.

`python -m benchmarks.rerank_inprocess` prints one run as JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.figures import percentile
from benchmarks.machine import ROOT
from benchmarks.rerank_servers import requests
from benchmarks.servers import ServerFailed, inherited
from services.rerank.models import load_backends
from services.rerank.ports import Window
from services.rerank.settings import NONE, RerankSettings

Kind = Literal["predict", "backend"]
WARM_UPS = 3

_FASTEST_S = 0.005  # Requests are made for at least this time each.


@dataclass(frozen=True, slots=True)
class Timed:
    """How long each request of *documents* pairs took."""

    documents: int
    seconds: Sequence[float]

    @property
    def p50_ms(self) -> float:
        """The median request."""
        return percentile(self.seconds, 50) * 1000

    @property
    def pairs_per_s(self) -> float:
        """Pairs scored per second over the whole stretch."""
        return self.documents * len(self.seconds) / sum(self.seconds)


def measure_apart(
    kind: Kind,
    model: Path | str,
    *,
    documents: int,
    duration_s: float,
    seed: int,
) -> Timed:
    """
    Score requests of *documents* pairs one after the other for *duration_s* in a process of its own.

    Our backend computes as the service does: what is fastest was measured at the service's start, and kept.

    Raises:
        ServerFailed: The process failed.
    """
    options = {"model": model, "documents": documents, "seconds": duration_s, "seed": seed}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "benchmarks.rerank_inprocess", kind, *words]
    ended = subprocess.run(command, cwd=ROOT, env=inherited(), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ServerFailed(f"{kind} failed:\n{ended.stderr[-1500:]}")
    return Timed(documents, json.loads(ended.stdout.splitlines()[-1]))


def library(model: str) -> Callable[[list[str]], object]:
    """Return the library's own scoring of a request, at fp32 and with its defaults."""
    import torch
    from sentence_transformers import CrossEncoder

    loaded = CrossEncoder(model, device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return lambda request: loaded.predict([(request[0], text) for text in request[1:]], show_progress_bar=False)


def backend(model: str) -> Callable[[list[str]], list[float]]:
    """Return our own backend's scoring of a request, tokenising included, in batches as large as the service's."""
    settings = RerankSettings.model_validate({"model": model, "first_stage": NONE})
    (loaded,) = load_backends(settings)

    def batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
        batch: list[Window] = []
        tokens = 0
        for window in windows:
            cost = loaded.cost_tokens(window)
            if batch and tokens + cost > settings.max_batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(window)
            tokens += cost
        yield batch

    def score(request: list[str]) -> list[float]:
        query = loaded.tokenize_query(request[0])
        documents = loaded.tokenize(request[1:])
        made: list[float] = []
        for batch in batches([Window(query, document, 0, len(document.ids)) for document in documents]):
            made += map(loaded.relevance, loaded.score(batch))
        return made

    return score


def timed(score: Callable[[list[str]], object], made: Sequence[list[str]], duration_s: float) -> list[float]:
    """Return how long each request took, over *duration_s* at least; the first few are not counted."""
    for request in made[:WARM_UPS]:
        score(request)
    seconds: list[float] = []
    for request in made[WARM_UPS:]:
        began = time.perf_counter()
        score(request)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) >= duration_s:
            break
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Rerank without HTTP, and print the seconds of each request.")
    parser.add_argument("kind", choices=("predict", "backend"))
    parser.add_argument("--model", required=True)
    for name, kind in (("documents", int), ("seconds", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    given = parser.parse_args()
    score = (library if given.kind == "predict" else backend)(given.model)
    count = WARM_UPS + 1 + int(given.seconds / (_FASTEST_S * max(1, given.documents / 10)))
    print(json.dumps(timed(score, requests(count, given.documents, given.seed), given.seconds)))


if __name__ == "__main__":
    main()
