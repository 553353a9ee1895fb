"""Directories and files that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.embedding.offline.console import OfflineError

# Written into every exported directory: what `--force` may replace.
MARK = "tercet_export.json"


def check_free(target: Path, *, force: bool) -> None:
    """
    See that *target* may be written: nothing is there, or an empty directory, or with *force* an earlier export.

    Raises:
        OfflineError: Something else is there, or no directory can be made where it would be.
    """
    nearest = next(place for place in (target.absolute(), *target.absolute().parents) if place.exists())
    if nearest == target.absolute():
        if not target.is_dir():
            raise OfflineError(f"{target} exists and is no directory")
        if any(target.iterdir()):
            if not (target / MARK).is_file():
                raise OfflineError(f"{target} holds something that is no export of this command: choose another place")
            if not force:
                raise OfflineError(f"{target} exists; --force replaces it")
        nearest = target.absolute().parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OfflineError(f"{target} cannot be written: {nearest} is no directory that can be written to")


@contextmanager
def new_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """
    Yield an empty directory beside *target*, which becomes *target* at the end, or is removed if anything is raised.

    Raises:
        OfflineError: See `check_free`.
    """
    check_free(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.parent / f".making-{target.name}-{os.getpid()}"
    before = target.parent / f".replaced-{target.name}-{os.getpid()}"
    made.mkdir()
    try:
        yield made
        if target.exists():
            target.replace(before)
        made.replace(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
