"""The commands of `tercet`, one module each, and here what they share: which stack is meant, and starting one."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer

from tercet.client import DEFAULT_URL, TercetClient
from tercet.console import say, say_event
from tercet.stack import LocalStack, Ports, read_state

DEFAULT_DATA_DIR = Path(".tercet")

Url = Annotated[
    str | None,
    typer.Option(
        envvar="TERCET_URL",
        help=f"The search service. Without it: the stack that `tercet up` runs from this folder, else {DEFAULT_URL}.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="TERCET_API_KEY", help="The API key to send; better in the variable.", show_default=False),
]
DataDir = Annotated[Path, typer.Option(help="The folder that `tercet up` keeps everything in.")]


def resolve_url(url: str | None, data_dir: Path = DEFAULT_DATA_DIR) -> str:
    """Return the address meant: the one given, else that of the stack that runs on *data_dir*, else the usual one."""
    if url:
        return url
    state = read_state(data_dir)
    return state.urls["search"] if state else DEFAULT_URL


@asynccontextmanager
async def reachable_stack(
    url: str | None,
    data_dir: Path,
    *,
    api_key: str | None = None,
    temporary_dir: Path,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[TercetClient, bool]]:
    """
    Yield a client of the stack meant, and whether that is a temporary one of our own.

    Where no *url* is given and nothing runs, a stack is started on free ports with *temporary_dir* as its data folder
    and *environ* added to its environment, and stopped again.
    """
    async with TercetClient(resolve_url(url, data_dir), api_key=api_key) as client:
        if url or await client.ready():
            await client.status()  # raises, and says what to do, if it is not there
            yield client, False
            return
    say("no stack is running: starting one for this command")
    stack = LocalStack(
        temporary_dir,
        environ={**os.environ, **(environ or {})},
        ports=Ports(0, 0, 0),
        api_key=api_key,
        on_event=say_event,
    )
    async with stack, TercetClient(stack.url, api_key=api_key) as client:
        yield client, True
