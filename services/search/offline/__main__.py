"""`python -m services.search.offline snapshot|restore|migrate …`: what `tercet snapshot` and so on run."""

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from services.search.offline.backup import Note, back_up
from services.search.offline.errors import OfflineError
from services.search.offline.layout import BackupManifest
from services.search.offline.restoring import restore

_INTERRUPTED = 130
_SHOWN = 5


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        try:
            return super().invoke(ctx)
        except OfflineError as error:
            typer.secho(f"tercet: {error}", fg="red", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.command("snapshot")
def snapshot(
    to: Annotated[str, typer.Option(help="Where backups are kept: a directory, or a URL such as s3://bucket/search.")],
    data_dir: Annotated[
        Path, typer.Option(envvar="SEARCH_DATA_DIR", help="The search service's data directory.")
    ] = Path(".tercet/search"),
    shards: Annotated[
        bool, typer.Option("--shards/--no-shards", help="With the shards' snapshots, which spare indexing again.")
    ] = True,
    ledger: Annotated[
        bool, typer.Option("--ledger/--no-ledger", help="With the ledger; not where it is in PostgreSQL.")
    ] = True,
    keep: Annotated[
        int | None, typer.Option(help="Keep so many of the newest backups there.", min=1, show_default="all")
    ] = None,
) -> None:
    """
    Back up a search service's data, while it runs or not.

    Every document acknowledged before the command began is in it. Each backup is a folder named by its time in UTC.
    """
    with _noting("backing up") as note:
        made = back_up(data_dir, to, ledger=ledger, shards=shards, keep=keep, note=note)
    typer.secho(f"backed up: {made.url}", fg="green")
    _say_contents(made.manifest)
    if made.left_out:
        more = f" and {len(made.left_out) - _SHOWN} more" if len(made.left_out) > _SHOWN else ""
        listed = ", ".join(made.left_out[:_SHOWN]) + more
        typer.secho(f"  without a good snapshot, to be indexed from the ledger: {listed}", fg="yellow")
    if made.removed:
        typer.echo(f"  removed      {len(made.removed)} older")


@app.command("restore")
def restore_backup(
    backup: Annotated[str, typer.Argument(help="Where backups are kept, for the newest; or one of them.")],
    data_dir: Annotated[
        Path, typer.Option(envvar="SEARCH_DATA_DIR", help="The data directory to make; nothing may be there.")
    ],
) -> None:
    """Make a search service's data directory of a backup; every file is checked first."""
    with _noting("restoring") as note:
        restored = restore(backup, data_dir, note=note)
    for name in restored.passed_over:
        typer.secho(f"passed over {name}, which was never finished", fg="yellow")
    typer.secho(f"restored: {restored.url} in {data_dir}", fg="green")
    _say_contents(restored.manifest)


@app.command("migrate")
def migrate_ledger(
    to: Annotated[
        str,
        typer.Option(
            envvar="SEARCH_LEDGER_URL",
            help="The PostgreSQL database, postgresql://user:password@host/name; better in the variable.",
            show_default=False,
        ),
    ],
    data_dir: Annotated[
        Path, typer.Option(envvar="SEARCH_DATA_DIR", help="The data directory whose ledger.db is to be moved.")
    ] = Path(".tercet/search"),
) -> None:
    """
    Move an embedded ledger into an empty PostgreSQL ledger, and compare both; no service may run on it meanwhile.

    It becomes visible there at once and as a whole. The embedded one stays as it is.
    """
    # The driver of PostgreSQL is not imported by commands that do without.
    from services.search.offline.migrate import migrate

    with _noting("migrating") as note:
        done = asyncio.run(migrate(data_dir, to, note=note))
    if done.already:
        typer.secho(f"nothing to do: {done.place} holds all of {data_dir} already", fg="green")
    else:
        typer.secho(f"migrated: {data_dir} to {done.place}", fg="green")
    for collection in done.collections:
        receipts = f", {_count(collection.receipts, 'receipt')}" if collection.receipts else ""
        typer.echo(
            f"  {collection.name}: {_count(collection.documents, 'document')}, last operation {collection.seq:,}{receipts}, "
            f"digest {collection.digest}"
        )
    typer.echo(f"  {_count(len(done.collections), 'collection')} and {_count(done.aliases, 'alias')}, the same in both")
    if not done.durable:
        typer.secho("  this PostgreSQL has fsync=off: it may lose data in a power failure", fg="yellow")
    typer.echo(
        "From now on start every search process with SEARCH_LEDGER_URL: what is written without it stays behind."
    )


@contextmanager
def _noting(label: str) -> Iterator[Note]:
    """Show on a terminal what is being done, in a line that goes away."""
    console = Console(stderr=True)
    with console.status(label) as status:
        yield lambda what: status.update(Text(f"{label}: {what}"))


def _say_contents(manifest: BackupManifest) -> None:
    if manifest.collections is None:
        typer.echo("  ledger       not in it")
    else:
        documents = sum(collection.documents for collection in manifest.collections)
        typer.echo(
            f"  ledger       {_count(documents, 'document')} in {_count(len(manifest.collections), 'collection')}"
        )
    ready = sum(shard.documents for shard in manifest.shards)
    typer.echo(f"  shards       {_count(len(manifest.shards), 'snapshot')} of {_count(ready, 'document')}")
    typer.echo(f"  files        {len(manifest.files)}, {manifest.size_bytes / 1e6:,.1f} MB")


def _count(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


if __name__ == "__main__":
    sys.exit(app(prog_name="tercet"))
