"""`tercet train-reranker`: a cross-encoder that learns from one's own judgements."""

import typer

from tercet.commands.offline import run_apart


def train_reranker(context: typer.Context) -> None:
    """Train the reranker on your own judgements; a model that ranks worse is not written."""
    run_apart("training.own", context.args)
