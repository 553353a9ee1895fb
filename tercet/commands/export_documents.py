"""`tercet export-documents`: a collection as NDJSON, which `tercet index -` reads back."""

import asyncio
from typing import Annotated

import typer

from tercet.client import TercetClient
from tercet.commands import ApiKey, Url, resolve_url
from tercet.commands.collections import Name
from tercet.commands.search import parse_filter
from tercet.console import out


def export_documents(
    collection: Name,
    filter: Annotated[str | None, typer.Option(help="Only documents that match this filter, as JSON.")] = None,
    vectors: Annotated[bool, typer.Option("--vectors", help="With their vectors.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Write all documents of a collection to standard output, one a line."""
    asyncio.run(_export(TercetClient(resolve_url(url), api_key=api_key), collection, parse_filter(filter), vectors))


async def _export(client: TercetClient, collection: str, wanted: dict[str, object] | None, vectors: bool) -> None:
    async with client:
        async for document in client.export_documents(collection, filter=wanted, vectors=vectors):
            out.out(document.model_dump_json(exclude_none=True, exclude={"seq"}), highlight=False)
