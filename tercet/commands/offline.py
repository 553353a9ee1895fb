"""What commands share that run in a process of their own: `export`, `migrate`, `snapshot` and so on."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import typer

# For typer's `command`: options, --help among them, are for that process to read.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def run_offline(service: Literal["embedding", "search"], command: str, arguments: Sequence[str]) -> None:
    """
    Run *command* of *service* with *arguments*, as `run_apart` does.

    Raises:
        typer.Exit: See `run_apart`.
    """
    run_apart(f"services.{service}.offline", [command, *arguments])


def run_apart(module: str, arguments: Sequence[str]) -> None:
    """
    Run *module* with *arguments*; its output goes where ours goes, its exit status becomes ours.

    Ctrl-C reaches both processes: the command gets the time to remove what it has written in part.

    Raises:
        typer.Exit: It failed; 128 and the signal's number for one that a signal ended.
    """
    # -P keeps a `services` folder of the user's out of its way.
    process = subprocess.Popen([sys.executable, "-P", "-m", module, *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)
