"""`tercet up`: the whole stack in the foreground."""

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tercet.client import TercetClient, TercetClientError
from tercet.commands import DEFAULT_DATA_DIR, ApiKey, DataDir
from tercet.commands.demo import ENVIRON as DEMO_ENVIRON
from tercet.commands.demo import Demo
from tercet.console import fail, out, say, say_event
from tercet.stack import LOOPBACK, LocalStack, Ports

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class _Options:
    data_dir: Path
    host: str
    ports: Ports
    environ: dict[str, str]
    api_key: str | None
    demo: bool


def up(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    host: Annotated[
        str, typer.Option(envvar="SEARCH_LISTEN_HOST", help="Where search listens; the others stay on loopback.")
    ] = LOOPBACK,
    search_port: Annotated[
        int, typer.Option(envvar="SEARCH_LISTEN_PORT", help="0 picks one.", min=0, max=65535)
    ] = 8000,
    embedding_port: Annotated[int, typer.Option(envvar="EMBEDDING_LISTEN_PORT", min=0, max=65535)] = 8001,
    rerank_port: Annotated[int, typer.Option(envvar="RERANK_LISTEN_PORT", min=0, max=65535)] = 8002,
    model: Annotated[
        str | None,
        typer.Option(
            help="Embedding model: a folder, a hub id, or `fake`, which needs no weights and fakes reranking too."
        ),
    ] = None,
    api_key: ApiKey = None,
    demo: Annotated[bool, typer.Option("--demo", help="Index Python's own documentation, and ask about it.")] = False,
) -> None:
    """
    Run embedding, rerank and search on this machine until Ctrl-C.

    EMBEDDING_*, RERANK_* and SEARCH_* variables reach the services; a service that ends is started again.
    With an API key all three ask for it.
    """
    environ = dict(os.environ)
    if model is not None:
        environ["EMBEDDING_MODEL"] = model
    if model == "fake":
        environ["RERANK_MODEL"] = model
    if demo:
        environ |= DEMO_ENVIRON
    ports = Ports(search=search_port, embedding=embedding_port, rerank=rerank_port)
    asyncio.run(_until_told(_Options(data_dir, host, ports, environ, api_key, demo)))


async def _until_told(options: _Options) -> None:
    """Run the stack until a signal comes; whatever it is doing then is ended in order."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    running = asyncio.create_task(_run(options))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done():
        say("stopping")
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    if stop.is_set():
        say("stopped")


async def _run(options: _Options) -> None:
    started = time.monotonic()
    stack = LocalStack(
        options.data_dir,
        environ=options.environ,
        ports=options.ports,
        host=options.host,
        api_key=options.api_key,
        on_event=say_event,
    )
    say("starting embedding, rerank and search")
    try:
        with out.status("loading the models"):
            await stack.start()
        say(f"ready after {time.monotonic() - started:.1f} s; the data and the logs are in {options.data_dir}")
        _say_addresses(stack)
        if options.demo:
            await _show_demo(stack, options, started)
        say("Ctrl-C stops it", "dim")
        await asyncio.Event().wait()
    finally:
        await stack.stop()


async def _show_demo(stack: LocalStack, options: _Options, started: float) -> None:
    try:
        async with TercetClient(stack.url, api_key=options.api_key) as client:
            model = options.environ.get("EMBEDDING_MODEL", "")
            await Demo(client, options.data_dir, model=model, started=started).show()
    except (TercetClientError, RuntimeError) as error:
        # The stack is well; only the demo is not.
        fail(f"the demo could not be shown: {error}")
        return
    say("")
    _say_addresses(stack)


def _say_addresses(stack: LocalStack) -> None:
    urls = stack.urls
    rows = [
        ("search", f"{urls['search']}/?q=run+a+coroutine+with+a+timeout"),
        ("API", f"{urls['search']}/docs"),
        ("embedding", f"{urls['embedding']}/docs"),
        ("rerank", f"{urls['rerank']}/docs"),
        ("metrics", f"{urls['search']}/metrics, and the same of the others"),
    ]
    for name, address in rows:
        say(f"  {name:<10} {address}", "cyan")
