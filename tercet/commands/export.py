"""`tercet export`: a model as ONNX, or as a Triton model repository."""

import typer

from tercet.commands.offline import run_offline


def export(context: typer.Context) -> None:
    """Write a model as verified ONNX, or as a Triton model repository."""
    run_offline("embedding", "export", context.args)
