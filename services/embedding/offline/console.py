"""What these commands print: lines, tables of two columns, and how far something is."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# What is printed holds names of the user's: none of it is markup or an emoji name.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)


class OfflineError(Exception):
    """Something that the user can mend; the message says what."""


def silence_libraries() -> None:
    """Keep the warnings and progress bars of the libraries out of what a user reads. Call it before they are imported."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def say(text: str, style: str = "") -> None:
    """Print a line; a long one is left to the terminal to break."""
    out.print(Text(text, style=style), soft_wrap=True)


def fail(message: str) -> None:
    """Print an error on standard error."""
    err.print(Text(f"tercet: {message}", style="red"), soft_wrap=True)


def say_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values under each other, the values aligned."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", value)
    out.print(table, width=None if out.is_terminal else 120)


class Counter:
    """How many of a known number are done; `add` may be called from one thread at a time."""

    def __init__(self, bar: Progress, label: str, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total)

    def add(self, count: int) -> None:
        """Say that *count* more are done."""
        self._bar.advance(self._task, count)


@contextmanager
def progress(label: str, total: int) -> Iterator[Counter]:
    """Show a bar on a terminal, and one line at the end elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        yield Counter(bar, label, total)
    if not out.is_terminal:
        say(f"{label}: {total}")
