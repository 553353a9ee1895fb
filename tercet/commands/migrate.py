"""`tercet migrate`: the embedded ledger, moved into PostgreSQL."""

import typer

from tercet.commands.offline import run_offline


def migrate(context: typer.Context) -> None:
    """Move a search service's embedded ledger into PostgreSQL."""
    run_offline("search", "migrate", context.args)
