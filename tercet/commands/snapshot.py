"""`tercet snapshot`: a backup of a search service's data."""

import typer

from tercet.commands.offline import run_offline


def snapshot(context: typer.Context) -> None:
    """Back up a search service's data, while it runs or not."""
    run_offline("search", "snapshot", context.args)
