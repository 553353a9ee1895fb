"""`tercet eval`: the ranking quality of each mode over a judged collection."""

import asyncio
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx2
import typer
from pydantic import ValidationError
from rich.table import Table

from services.common.wire.embedding import EmbedReply
from tercet.client import TercetClient
from tercet.commands import DEFAULT_DATA_DIR, ApiKey, DataDir, Url, reachable_stack
from tercet.console import ProgressLine, say, say_table, warn
from tercet.evaluation import MEASURE_NAMES, MODES, Beir, load_beir, measure

DEPTH = 100
_TIMEOUT_MS = 60_000
_TEMPORARY = "eval"


@dataclass(frozen=True, slots=True)
class _Scores:
    """What one mode reached, its mean time, and how many of its answers were degraded."""

    measures: dict[str, float]
    ms: float
    degraded: int


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Holds corpus.jsonl, queries.jsonl and qrels.tsv, plain or .gz.")],
    qrels: Annotated[Path | None, typer.Option(help="Judgements to use instead of the folder's qrels.tsv.")] = None,
    queries: Annotated[int | None, typer.Option(help="Ask only the first so many judged queries.", min=1)] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the collection in the running stack, for the next run.")
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """
    Measure dense, lexical, hybrid and hybrid + rerank over a collection in BEIR's layout.

    The documents go into a collection named after the folder, its content and the model. In a running stack it is
    deleted at the end, unless it was there before or --keep is given. Without a running stack one is started for this
    command; what it indexed stays in the folder eval of the data folder, so that the next run need not embed it again.
    """
    asyncio.run(_evaluate(folder, qrels, queries, keep, url, api_key, data_dir))


async def _evaluate(
    folder: Path,
    qrels: Path | None,
    queries: int | None,
    keep: bool,
    url: str | None,
    api_key: str | None,
    data_dir: Path,
) -> None:
    beir = load_beir(folder, qrels=qrels)
    if queries is not None:
        beir = beir.first(queries)
    stack = reachable_stack(url, data_dir, api_key=api_key, temporary_dir=data_dir / _TEMPORARY)
    async with stack as (client, is_temporary):
        name = collection_name(beir, await _fingerprint(client))
        existed = await client.find_collection(name) is not None
        try:
            await _index(client, beir, name)
            scores = {mode: await _run(client, beir, name, mode) for mode in MODES}
        finally:
            if not (is_temporary or existed or keep):
                await client.delete_collection(name)
    _say_scores(beir, scores)


def collection_name(beir: Beir, fingerprint: str) -> str:
    """Return the name of the collection of *beir*'s documents as the model with *fingerprint* embeds them."""
    digest = hashlib.sha256(f"{beir.summary.digest} {fingerprint}".encode()).hexdigest()
    folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", beir.folder.resolve().name)[:40]
    return f"eval-{folder}-{digest[:12]}"


async def _fingerprint(client: TercetClient) -> str:
    """Return the embedding model's fingerprint, or nothing if the embedding service cannot be asked from here."""
    url = (await client.status()).dependencies.get("embedding", {}).get("url")
    try:
        async with httpx2.AsyncClient(trust_env=False, timeout=30, headers=client.key_headers) as http:
            response = await http.post(f"{url}/embed", json={"inputs": "fingerprint"})
        return EmbedReply.model_validate_json(response.content).fingerprint
    except (httpx2.HTTPError, httpx2.InvalidURL, ValidationError):
        return ""


async def _index(client: TercetClient, beir: Beir, name: str) -> None:
    found = await client.find_collection(name)
    total = beir.summary.documents
    if found is not None and found.documents == total:
        say(f"{name}: {total} documents, indexed before")
        return
    with ProgressLine(f"indexing into {name}", unit="texts", total=total) as progress:
        await client.index(name, beir.documents(), on_batch=lambda summary: progress.update(summary.documents))


async def _run(client: TercetClient, beir: Beir, name: str, mode: str) -> _Scores:
    run: dict[str, list[str]] = {}
    degraded, seconds = 0, 0.0
    with ProgressLine(mode, unit="queries", total=len(beir.queries)) as progress:
        for id_, query in beir.queries.items():
            asked = time.monotonic()
            reply = await client.search(
                query=query,
                collection=name,
                k=DEPTH,
                include=[],
                cache=False,
                timeout_ms=_TIMEOUT_MS,
                **MODES[mode],
            )
            seconds += time.monotonic() - asked
            degraded += bool(reply.degraded) or reply.coverage.ratio < 1
            run[id_] = [hit.id for hit in reply.hits]
            progress.update(len(run))
    return _Scores(measure(beir.qrels, run), 1000 * seconds / len(run), degraded)


def _say_scores(beir: Beir, scores: dict[str, _Scores]) -> None:
    table = Table("mode", title=f"{beir.folder.name}: {len(beir.queries)} queries, {beir.summary.documents} documents")
    for name in (*MEASURE_NAMES, "ms/query", "degraded"):
        table.add_column(name, justify="right")
    for mode, score in scores.items():
        values = [f"{score.measures[name]:.4f}" for name in MEASURE_NAMES]
        table.add_row(mode, *values, f"{score.ms:.1f}", str(score.degraded))
    say_table(table)
    degraded = sum(score.degraded for score in scores.values())
    say(f"degraded answers: {degraded} of {len(beir.queries) * len(scores)}")
    if degraded:
        warn("a degraded answer is worse than the stack's own: these figures are not what it can do")
