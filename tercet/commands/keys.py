"""`tercet keys`: new API keys."""

import hashlib
import secrets
from typing import Annotated, get_args

import typer
from pydantic import ValidationError

from services.common.wire.keys import KeyEntry, KeyScope
from tercet.console import out, say

KEY_BYTES = 32

app = typer.Typer(no_args_is_help=True, help="API keys for the services.")


@app.callback()
def _keys() -> None:
    pass


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs and limits go by this name.")],
    scopes: Annotated[
        str, typer.Option(help=f"What it may do, with commas: {', '.join(get_args(KeyScope))} (which is everything).")
    ] = "search",
) -> None:
    """Make a key and print it, this once, with its entry for the file of keys (EMBEDDING_API_KEYS_FILE and so on)."""
    key = secrets.token_urlsafe(KEY_BYTES)
    try:
        entry = KeyEntry.model_validate(
            {
                "name": name,
                "sha256": hashlib.sha256(key.encode()).hexdigest(),
                "scopes": [scope.strip() for scope in scopes.split(",")],
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = "NAME" if first["loc"][0] == "name" else "--scopes"
        raise typer.BadParameter(first["msg"], param_hint=option) from None
    say("The key, which is kept nowhere:", "dim")
    out.out(key, highlight=False)
    say("Its entry for the list in the file of keys:", "dim")
    out.out(entry.model_dump_json(exclude_none=True), highlight=False)
