"""`tercet collections`: make, list, describe, snapshot and delete them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar, cast, get_args

import typer
from rich.table import Table

from services.common.wire.collections import AttributeKind, CollectionReply, CollectionStats, Metric
from tercet.client import TercetClient
from tercet.commands import ApiKey, Url, resolve_url
from tercet.console import say, say_table

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Collections: make, list, describe, snapshot, delete.")

Name = Annotated[str, typer.Argument(help="The collection, or an alias of it.")]
Attribute = Annotated[
    list[str] | None,
    typer.Option(
        help=f"A field that filters may name, as FIELD=KIND ({', '.join(get_args(AttributeKind))}); may repeat."
    ),
]


def ask(url: str | None, api_key: str | None, call: Callable[[TercetClient], Awaitable[T]]) -> T:
    """Return what *call* returns for a client of the service meant."""

    async def run() -> T:
        async with TercetClient(resolve_url(url), api_key=api_key) as client:
            return await call(client)

    return asyncio.run(run())


def kinds_of(attributes: list[str] | None) -> dict[str, AttributeKind] | None:
    """Return FIELD=KIND options as a mapping; None without any. Raises BadParameter for another form."""
    if not attributes:
        return None
    pairs = [attribute.partition("=") for attribute in attributes]
    for field, _, kind in pairs:
        if not field or kind not in get_args(AttributeKind):
            known = ", ".join(get_args(AttributeKind))
            raise typer.BadParameter(f"must be FIELD=KIND with one of: {known}", param_hint="--attribute")
    return {field: cast(AttributeKind, kind) for field, _, kind in pairs}


@app.command("list")
def list_collections(url: Url = None, api_key: ApiKey = None) -> None:
    """List all collections."""
    found = ask(url, api_key, lambda client: client.collections())
    if not found:
        say("no collections yet: `tercet index PATH --collection NAME` makes one")
        return
    table = Table("collection", "model", "metric", "aliases")
    for name in ("documents", "dim", "shards", "seq", "applied"):
        table.add_column(name, justify="right")
    for each in found:
        model = each.model or "the documents' own vectors"
        numbers = (each.documents, each.dim, each.shards, each.seq, each.applied_seq)
        table.add_row(each.name, model, each.metric, ", ".join(each.aliases), *map(str, numbers))
    say_table(table)


@app.command("show")
def show(name: Name, url: Url = None, api_key: ApiKey = None) -> None:
    """Describe one collection and its shards."""

    async def both(client: TercetClient) -> tuple[CollectionReply, CollectionStats]:
        return await client.collection(name), await client.collection_stats(name)

    found, stats = ask(url, api_key, both)
    attributes = (
        "all, as any" if found.attributes is None else ", ".join(f"{k}={v}" for k, v in found.attributes.items())
    )
    say(f"{found.name}: {found.documents} documents, {found.dim} dimensions, {found.metric}, {found.language}")
    say(f"  model: {found.model or 'none'} ({found.fingerprint})")
    say(f"  indexed attributes: {attributes or 'none'}")
    say(f"  aliases: {', '.join(found.aliases) or 'none'}")
    table = Table("host", "shard", "segments", "state")
    for column in ("documents", "applied", "snapshot", "memory MB", "disk MB"):
        table.add_column(column, justify="right")
    for host, shards in stats.hosts.items():
        for each in shards:
            state = each.failure or ("catching up" if each.catching_up else "ok")
            segments = ", ".join(f"{kind} {rows}" for kind, rows in each.segments.items())
            sizes = (f"{each.memory_bytes / 1e6:.1f}", f"{each.disk_bytes / 1e6:.1f}")
            numbers = (each.documents, each.applied_seq, each.snapshot_seq)
            table.add_row(host, str(each.shard), segments, state, *map(str, numbers), *sizes)
    say_table(table)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="The new collection's name.")],
    model: Annotated[str | None, typer.Option(help="A model of the embedding service.")] = None,
    metric: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Metric))}.")] = "cosine",
    dim: Annotated[int | None, typer.Option(help="Dimensions of the documents' own vectors; no model then.")] = None,
    shards: Annotated[int | None, typer.Option(help="How many shards.", min=1, max=256)] = None,
    attribute: Attribute = None,
    language: Annotated[str, typer.Option(help="Of its text: for stemming and stop words.")] = "english",
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Create an empty collection."""
    if metric not in get_args(Metric):
        raise typer.BadParameter(f"must be one of {', '.join(get_args(Metric))}", param_hint="--metric")
    attributes = kinds_of(attribute)
    made = ask(
        url,
        api_key,
        lambda client: client.create_collection(
            name,
            model=model,
            metric=cast(Metric, metric),
            dim=dim,
            shards=shards,
            attributes=attributes,
            language=language,
        ),
    )
    say(f"{made.name}: {made.dim} dimensions, {made.metric}, {made.shards} shards, model {made.model or 'none'}")


@app.command("delete")
def delete(
    name: Annotated[str, typer.Argument(help="The collection's own name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Delete a collection with all its documents."""
    if not yes:
        typer.confirm(f"Delete {name} with all its documents?", abort=True)
    ask(url, api_key, lambda client: client.delete_collection(name))
    say(f"{name} is deleted")


@app.command("snapshot")
def snapshot(name: Name, url: Url = None, api_key: ApiKey = None) -> None:
    """Let every host write snapshots of its shards now, so that its next start is quick."""
    written = ask(url, api_key, lambda client: client.snapshot(name))
    for host, shards in written.hosts.items():
        for shard, seq in shards.items():
            say(f"{host}: shard {shard} is on disk as of operation {seq}")
