"""`tercet reindex`: a collection's documents into another one, with another model or other settings."""

import asyncio
from typing import Annotated, Any

import typer

from services.common.wire.collections import ReindexReply
from tercet.client import TercetClient
from tercet.commands import ApiKey, Url
from tercet.commands.collections import Attribute, ask, kinds_of
from tercet.console import ProgressLine, fail, say

_LOOK_EVERY_S = 0.5


def reindex(
    source: Annotated[str, typer.Argument(help="The collection to copy, or an alias of it; it serves on.")],
    target: Annotated[str, typer.Argument(help="The new collection, or one that an earlier run has begun.")],
    model: Annotated[str | None, typer.Option(help="Another model of the embedding service.")] = None,
    shards: Annotated[int | None, typer.Option(help="Another number of shards.", min=1, max=256)] = None,
    metric: Annotated[str | None, typer.Option(help="Another metric: cosine, dot or l2.")] = None,
    attribute: Attribute = None,
    language: Annotated[str | None, typer.Option(help="Another language of its text.")] = None,
    alias: Annotated[str | None, typer.Option(help="Let this alias mean the copy once it is complete.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Copy a collection with other settings while it serves, follow it until the copy is complete, then switch an alias."""
    settings = {"model": model, "shards": shards, "metric": metric, "language": language, "alias": alias}
    attributes = kinds_of(attribute)
    end = ask(url, api_key, lambda client: _reindex(client, source, target, {**settings, "attributes": attributes}))
    if end.state != "done":
        fail(f"the copy {end.state}: {end.trouble or 'somebody stopped it'}; the same command goes on with it")
        raise typer.Exit(1)
    switched = f"; {end.alias} means {end.target} now" if end.alias else ""
    left_out = f", {end.refused} did not fit its attributes" if end.refused else ""
    say(f"{end.copied} documents copied, {end.unchanged} were there, {end.embedded} embedded{left_out}{switched}")


async def _reindex(client: TercetClient, source: str, target: str, settings: dict[str, Any]) -> ReindexReply:
    reply = await client.reindex(source, target, **settings)
    with ProgressLine(f"copying into {target}", unit="documents") as progress:
        while reply.state == "copying":
            await asyncio.sleep(_LOOK_EVERY_S)
            reply = await client.reindex_progress(target)
            progress.update(reply.copied + reply.unchanged)
    return reply
