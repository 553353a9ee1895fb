"""`tercet restore`: a backup as the data directory of a search service."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import Conflict
from services.search.claim import LOCK_FILE, Claim
from services.search.offline.errors import BackupError
from services.search.offline.layout import LEDGER, SHARDS, BackupManifest
from services.search.offline.places import Place
from services.search.offline.shard_copies import shard_directories
from services.search.shards import files
from services.search.shards.snapshot import Snapshots

_STAGING = ".restoring"
_IGNORED = ("lost+found", _STAGING)

Note = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored; *passed_over* are newer backups that are not whole."""

    url: str
    manifest: BackupManifest
    passed_over: list[str]


def restore(url: str, data_dir: Path, *, note: Note = lambda _: None) -> Restored:
    """
    Make *data_dir*, which is empty or not there, of the backup at *url*, or of the newest whole one below it.

    All files are written beside it, checked and synced before they get their place. Where *data_dir* is a mount point
    they are written within, and the ledger gets its place last. Interrupted, it may be called again.

    Raises:
        BackupError: There is no whole backup, one of its files is damaged, or the directory cannot be written or is
            not empty.
    """
    place, name, passed_over = _find(url)
    manifest = place.manifest(name)
    assert manifest is not None
    data_dir = data_dir.absolute()
    try:
        _check_empty(data_dir)
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        within = data_dir.is_dir() and os.path.ismount(data_dir)
        made = data_dir / _STAGING if within else data_dir.with_name(f"{_STAGING}-{data_dir.name}")
        with _claimed(made):
            try:
                _fetch(place, name, manifest, made, note)
                files.remove(made / LOCK_FILE)  # The directory stays claimed by the one who has the file open.
                _move_in(made, data_dir, within=within)
            finally:
                files.remove(made)
    except OSError as error:
        raise BackupError(f"{data_dir} could not be written: {error}") from error
    return Restored(f"{place.url}/{name}", manifest, passed_over)


def _find(url: str) -> tuple[Place, str, list[str]]:
    """Return the place and the name of the backup meant, and which newer ones are not whole."""
    place, name = Place(url).split()
    if name is not None:
        if place.manifest(name) is None:
            raise BackupError(f"{url} is not there or not whole: a backup without a manifest was never finished")
        return place, name, []
    passed_over: list[str] = []
    for name in place.names():
        if place.manifest(name) is not None:
            return place, name, passed_over
        passed_over.append(name)
    half = f", only {len(passed_over)} that were never finished" if passed_over else ""
    raise BackupError(f"There is no whole backup at {url}{half}")


def _check_empty(data_dir: Path) -> None:
    if data_dir.exists() and not data_dir.is_dir():
        raise BackupError(f"{data_dir} is no directory")
    if data_dir.is_dir() and any(path.name not in _IGNORED for path in data_dir.iterdir()):
        raise BackupError(
            f"{data_dir} is not empty, and nothing there is ever overwritten: choose another directory, or move what "
            "is there away once no service uses it"
        )


def _claimed(directory: Path) -> "_Claimed":
    try:
        return _Claimed(directory)
    except Conflict as error:
        raise BackupError(f"Another restore is under way: {error}") from error


class _Claimed:
    """A claim on a directory as a context; what was in it is removed."""

    def __init__(self, directory: Path) -> None:
        self._claim = Claim(directory)
        for path in directory.iterdir():
            if path.name != LOCK_FILE:
                files.remove(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._claim.release()


def _fetch(place: Place, name: str, manifest: BackupManifest, made: Path, note: Note) -> None:
    for path, mark in manifest.files.items():
        note(path)
        place.read(name, path, made / path, mark)
    for shard in shard_directories(made / SHARDS):
        snapshots = Snapshots(shard)
        for snapshot in snapshots.names():  # Where there are no words yet, and places of objects know no empty folder.
            snapshots.lexical_directory(snapshot).mkdir(exist_ok=True)
    for directory in (*(path for path in made.rglob("*") if path.is_dir()), made):
        files.sync_directory(directory)


def _move_in(made: Path, data_dir: Path, *, within: bool) -> None:
    if within:
        for path in sorted(made.iterdir(), key=lambda path: path.name == LEDGER):
            files.rename(path, data_dir / path.name)
        files.sync_directory(data_dir)
        return
    try:
        files.rename(made, data_dir)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise BackupError(f"{data_dir} was written to meanwhile: is a service running on it?") from error
        raise
    files.sync_directory(data_dir.parent)
