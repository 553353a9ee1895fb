"""`tercet export`: a model as ONNX, as a Triton model repository, or as a plain directory."""

import typer

from tercet.commands.offline import run_offline


def export(context: typer.Context) -> None:
    """Write a model as verified ONNX, as a Triton model repository, or whole for sentence-transformers."""
    run_offline("embedding", "export", context.args)
