"""`tercet search`: one question, and its answers."""

import asyncio
import json
from typing import Annotated, Any

import typer

from services.common.wire.search import Mode
from tercet.client import TercetClient
from tercet.commands import ApiKey, Url, resolve_url
from tercet.console import out, say_reply


def search(
    query: Annotated[str, typer.Argument(help="The question, as plain words.")],
    collection: Annotated[str | None, typer.Option(help="Where to look; the service's default without it.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="How many answers.", min=1, max=1000)] = 10,
    mode: Annotated[Mode, typer.Option(help="How candidates are found.")] = "hybrid",
    rerank: Annotated[bool, typer.Option("--rerank/--no-rerank", help="Score the best candidates again.")] = True,
    filter: Annotated[str | None, typer.Option(help="""Conditions as JSON: '{"lang": {"$in": ["en"]}}'.""")] = None,
    group_by: Annotated[str | None, typer.Option(help="A metadata field: one answer for each of its values.")] = None,
    diversity: Annotated[
        float, typer.Option(help="How much answers should differ: 0 by relevance, 1 by novelty.", min=0, max=1)
    ] = 0.0,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every vector.")] = False,
    highlight: Annotated[bool, typer.Option("--highlight", help="Show the best passage, the words marked.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show how each shard searched.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's reply as JSON.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Search a collection."""
    fields: dict[str, Any] = {
        "query": query,
        "collection": collection,
        "k": k,
        "mode": mode,
        "rerank": rerank,
        "filter": parse_filter(filter),
        "group_by": group_by,
        "diversity": diversity or None,
        "exact": exact or None,
        "include": ["text", "metadata", "highlights"] if highlight else None,
        "explain": explain or None,
    }
    asyncio.run(_search(fields, TercetClient(resolve_url(url), api_key=api_key), as_json))


async def _search(fields: dict[str, Any], client: TercetClient, as_json: bool) -> None:
    async with client:
        reply = await client.search(**fields)
    if as_json:
        out.out(reply.model_dump_json(exclude_none=True, indent=2), highlight=False)
    else:
        say_reply(reply)


def parse_filter(text: str | None) -> dict[str, Any] | None:
    """Return the option --filter as a filter. Raises BadParameter for what is no JSON object."""
    if text is None:
        return None
    try:
        conditions = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not valid JSON: {error}", param_hint="--filter") from None
    if not isinstance(conditions, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--filter")
    return conditions
