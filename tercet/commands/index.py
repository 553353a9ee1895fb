"""`tercet index`: files become documents of a collection."""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from tercet.client import TercetClient
from tercet.commands import ApiKey, Url, resolve_url
from tercet.console import ProgressLine, say
from tercet.ingest import read_paths
from tercet.ingest.chunking import DEFAULT_MAX_CHUNK_CHARS


def index(
    paths: Annotated[list[str], typer.Argument(help="Files and folders; - reads NDJSON from standard input.")],
    collection: Annotated[str, typer.Option(help="The collection to write to; created if need be.")],
    batch_size: Annotated[int, typer.Option(help="Documents written at once.", min=1, max=1000)] = 64,
    max_chunk_chars: Annotated[
        int, typer.Option(help="Longer texts are split where their structure allows.", min=1)
    ] = DEFAULT_MAX_CHUNK_CHARS,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Index .md .txt .rst .html .jsonl .csv files, folders of them, or standard input."""
    places: list[Path | Literal["-"]] = ["-" if path == "-" else Path(path) for path in paths]
    client = TercetClient(resolve_url(url), api_key=api_key)
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
    seconds = time.monotonic() - started
    say(
        f"{summary.documents} documents in {seconds:.1f} s: {summary.unchanged} unchanged, {summary.embedded} embedded "
        f"({summary.documents / max(seconds, 1e-6):.0f} texts/s)"
    )
