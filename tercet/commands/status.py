"""`tercet status`: is it ready, what does it depend on, what does it hold."""

import asyncio
from pathlib import Path

import typer
from rich.table import Table

from services.common.wire.collections import CollectionReply
from tercet.client import TercetClient
from tercet.commands import DEFAULT_DATA_DIR, ApiKey, DataDir, Url, resolve_url
from tercet.console import say, say_table
from tercet.stack import read_state


def status(url: Url = None, api_key: ApiKey = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Show readiness, dependencies and collections; exit status 1 if searches are not taken."""
    if not asyncio.run(_status(TercetClient(resolve_url(url, data_dir), api_key=api_key), data_dir)):
        raise typer.Exit(1)


async def _status(client: TercetClient, data_dir: Path) -> bool:
    async with client:
        found = await client.status()
        ready = await client.ready()
    say(
        f"search {found.version} at {client.base_url}: {'ready' if ready else 'not ready'}", "green" if ready else "red"
    )
    for name, dependency in found.dependencies.items():
        state = str(dependency.get("state"))
        if "url" not in dependency:
            say(f"  {name}: {state} {dependency.get('reason', '')}".rstrip(), "" if state == "ok" else "yellow")
            continue
        said = {"closed": "in use", "open": "not answering, searches do without", "half-open": "being tried again"}
        style = "" if state == "closed" else "yellow"
        say(f"  {name} at {dependency.get('url')}: breaker {state} ({said.get(state, 'unknown')})", style)
    say(f"  cache: {', '.join(f'{name} {value}' for name, value in found.cache.items())}")
    state_here = read_state(data_dir)
    if state_here and state_here.urls["search"] == client.base_url:
        pids = ", ".join(f"{name} {pid or 'down'}" for name, pid in state_here.pids.items())
        say(f"  processes: tercet up {state_here.pid}, {pids}")
    if found.collections:
        say_table(_collections_table(found.collections))
    else:
        say("no collections yet: `tercet index PATH --collection NAME` makes one")
    return ready


def _collections_table(collections: list[CollectionReply]) -> Table:
    table = Table("collection", "model", "metric")
    for name in ("documents", "dim", "shards", "seq", "applied"):
        table.add_column(name, justify="right")
    for collection in collections:
        numbers = (collection.documents, collection.dim, collection.shards, collection.seq, collection.applied_seq)
        model = collection.model or "the documents' own vectors"
        table.add_row(collection.name, model, collection.metric, *map(str, numbers))
    return table
