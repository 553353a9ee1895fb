"""`tercet alias`: other names of collections."""

from typing import Annotated

import typer

from tercet.commands import ApiKey, Url
from tercet.commands.collections import ask
from tercet.console import say

app = typer.Typer(no_args_is_help=True, help="Aliases: other names of collections, switched at once.")


@app.command("list")
def list_aliases(url: Url = None, api_key: ApiKey = None) -> None:
    """List all aliases."""
    found = ask(url, api_key, lambda client: client.aliases())
    for alias, collection in sorted(found.items()):
        say(f"{alias} -> {collection}")
    if not found:
        say("no aliases yet: `tercet alias set NAME COLLECTION` makes one")


@app.command("set")
def set_alias(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    collection: Annotated[str, typer.Argument(help="The collection that it is to mean from now on.")],
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Let an alias mean a collection; searches under way finish on the one that it meant before."""
    ask(url, api_key, lambda client: client.set_aliases({alias: collection}))
    say(f"{alias} -> {collection}")


@app.command("remove")
def remove(
    alias: Annotated[str, typer.Argument(help="The alias; its collection stays.")],
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Remove an alias."""
    ask(url, api_key, lambda client: client.set_aliases({alias: None}))
    say(f"{alias} is removed")
