"""`tercet index`: files become documents of a collection."""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from tercet.client import TercetClient
from tercet.commands import ApiKey, Url, resolve_url
from tercet.console import ProgressLine, say, warn
from tercet.ingest import read_paths
from tercet.ingest.chunking import DEFAULT_MAX_CHUNK_CHARS

_ERRORS_SHOWN = 20


def index(
    paths: Annotated[list[str], typer.Argument(help="Files and folders; - reads NDJSON from standard input.")],
    collection: Annotated[str, typer.Option(help="The collection to write to; created if need be.")],
    batch_size: Annotated[int, typer.Option(help="Documents written at once.", min=1, max=1000)] = 64,
    max_chunk_chars: Annotated[
        int, typer.Option(help="Longer texts are split where their structure allows.", min=1)
    ] = DEFAULT_MAX_CHUNK_CHARS,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Write all in one request; documents that are refused are left out and listed."),
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Index .md .txt .rst .html .jsonl .csv files, folders of them, or standard input."""
    places: list[Path | Literal["-"]] = ["-" if path == "-" else Path(path) for path in paths]
    client = TercetClient(resolve_url(url), api_key=api_key)
    if stream:
        if not asyncio.run(_stream(places, collection, max_chunk_chars, client)):
            raise typer.Exit(1)
    else:
        asyncio.run(_index(places, collection, batch_size, max_chunk_chars, client))


async def _index(
    places: list[Path | Literal["-"]], collection: str, batch_size: int, max_chunk_chars: int, client: TercetClient
) -> None:
    started = time.monotonic()
    documents = read_paths(places, max_chunk_chars=max_chunk_chars)
    async with client:
        with ProgressLine(f"indexing into {collection}", unit="texts") as progress:
            summary = await client.index(
                collection,
                documents,
                batch_size=batch_size,
                on_batch=lambda total: progress.update(total.documents),
            )
    _say_total(summary.documents, summary.unchanged, summary.embedded, time.monotonic() - started)


async def _stream(
    places: list[Path | Literal["-"]], collection: str, max_chunk_chars: int, client: TercetClient
) -> bool:
    """Write all in one request; return whether every document was taken."""
    started = time.monotonic()
    documents = read_paths(places, max_chunk_chars=max_chunk_chars)
    async with client:
        with ProgressLine(f"indexing into {collection}", unit="texts") as progress:
            total = await client.stream(
                collection, documents, on_progress=lambda so_far: progress.update(so_far.accepted)
            )
    _say_total(total.accepted, total.unchanged, total.embedded, time.monotonic() - started)
    for error in total.errors[:_ERRORS_SHOWN]:
        warn(f"document {error.index} ({error.id or 'no id'}) was left out: {error.message}")
    if total.failed > _ERRORS_SHOWN:
        warn(f"and {total.failed - _ERRORS_SHOWN} more were left out")
    return total.failed == 0


def _say_total(documents: int, unchanged: int, embedded: int, seconds: float) -> None:
    rate = documents / max(seconds, 1e-6)
    say(f"{documents} documents in {seconds:.1f} s: {unchanged} unchanged, {embedded} embedded ({rate:.0f} texts/s)")
