"""`tercet restore`: a search service's data directory, made of a backup."""

import typer

from tercet.commands.offline import run_offline


def restore(context: typer.Context) -> None:
    """Make a search service's data directory of a backup."""
    run_offline("search", "restore", context.args)
