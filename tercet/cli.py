"""`tercet …`: the commands, and how their errors are told: one red line and exit status 1."""

import os
from typing import Any

import typer
from typer.core import TyperGroup

from tercet import __version__
from tercet.client import TercetClientError
from tercet.commands import (
    alias,
    audit,
    collections,
    demo,
    evaluate,
    export,
    export_documents,
    fit_pca,
    index,
    keys,
    migrate,
    plan,
    reindex,
    restore,
    search,
    snapshot,
    status,
    train_reranker,
    up,
)
from tercet.commands.offline import PASS_ON
from tercet.console import fail, flush, say
from tercet.evaluation import DatasetError
from tercet.ingest import IngestError
from tercet.stack import StackError

# What the user can mend; anything else is a fault of ours and keeps its traceback.
_TOLD = (TercetClientError, IngestError, StackError, DatasetError, demo.DemoError)
_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Runs a command and turns the errors that it is expected to have into a line for the user."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _TOLD as error:
            fail(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    name="tercet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="A retrieval stack to run yourself: embedding, search and reranking.",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        say(f"tercet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_say_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("up")(up.up)
app.command("index")(index.index)
app.command("search")(search.search)
app.command("status")(status.status)
app.command("eval")(evaluate.evaluate)
app.command("demo-eval")(demo.demo_eval)
app.command("export", context_settings=PASS_ON)(export.export)
app.command("fit-pca", context_settings=PASS_ON)(fit_pca.fit_pca)
app.command("train-reranker", context_settings=PASS_ON)(train_reranker.train_reranker)
app.command("snapshot", context_settings=PASS_ON)(snapshot.snapshot)
app.command("restore", context_settings=PASS_ON)(restore.restore)
app.command("migrate", context_settings=PASS_ON)(migrate.migrate)
app.command("plan")(plan.plan)
app.command("reindex")(reindex.reindex)
app.command("audit")(audit.audit)
app.command("export-documents")(export_documents.export_documents)
app.add_typer(collections.app, name="collections")
app.add_typer(alias.app, name="alias")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command line; the console script `tercet`."""
    try:
        app(prog_name="tercet")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            # A thread may still be blocked on standard input, and an orderly exit would fail on its lock.
            flush()
            os._exit(_INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
