"""`tercet fit-pca`: a projection to fewer dimensions, fitted on one's own texts."""

import typer

from tercet.commands.offline import run_offline


def fit_pca(context: typer.Context) -> None:
    """Fit a projection of vectors to fewer dimensions on your texts."""
    run_offline("embedding", "fit-pca", context.args)
