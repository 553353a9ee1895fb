"""`tercet snapshot`: the data of a search service, running or not, copied to a place of backups."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from services.common.errors import Conflict
from services.search.claim import Claim
from services.search.offline.errors import BackupError
from services.search.offline.layout import (
    FORMAT,
    LEDGER,
    SHARDS,
    BackupManifest,
    CollectionMark,
    ShardMark,
    check_no_stack,
    new_name,
)
from services.search.offline.ledger_copy import copy_ledger
from services.search.offline.places import Place
from services.search.offline.shard_copies import shard_directories, stage_shard
from services.search.shards import files
from services.search.shards.snapshot import FileMark

STAGING = ".backup"

Note = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made; *left_out* are shards that had no good snapshot, *removed* are older backups."""

    url: str
    manifest: BackupManifest
    left_out: list[str]
    removed: list[str]


def back_up(
    data_dir: Path,
    to: str,
    *,
    ledger: bool = True,
    shards: bool = True,
    keep: int | None = None,
    note: Note = lambda _: None,
) -> Made:
    """
    Copy what is in *data_dir* into a new backup at *to*; then remove all but the newest *keep* backups there.

    The ledger is copied last: it has every operation that the shards' copies have, and every one acknowledged before
    this was called. What is copied is put beside the data first, so it needs room for the ledger or the largest store.
    *note* is told what is being done.

    Raises:
        OfflineError: There is no such data, it cannot be read, or the place cannot be written.
    """
    _check(data_dir, ledger=ledger, shards=shards)
    place = Place(to)
    name = new_name()
    marks: dict[str, FileMark] = {}
    kept: list[ShardMark] = []
    left_out: list[str] = []
    collections: list[CollectionMark] | None = None
    try:
        with _Staging(data_dir) as staging:
            for source in shard_directories(data_dir / SHARDS) if shards else ():
                path = f"{SHARDS}/{source.relative_to(data_dir / SHARDS)}"
                note(path)
                mark = stage_shard(source, staging.path)
                if mark is None:
                    left_out.append(path)
                    continue
                kept.append(mark)
                marks |= _send(staging.path, place, name, path)
                staging.clear()
            if ledger:
                note(LEDGER)
                staging.path.mkdir()
                collections = copy_ledger(data_dir / LEDGER, staging.path / LEDGER)
                marks[LEDGER] = place.write(staging.path / LEDGER, name, LEDGER)
    except OSError as error:
        raise BackupError(f"{data_dir} could not be copied: {error}") from error
    if not marks:
        raise BackupError(f"No shard below {data_dir} has a snapshot yet: there is nothing to back up")
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = BackupManifest(format=FORMAT, made_at=made_at, collections=collections, shards=kept, files=marks)
    place.finish(name, manifest)
    return Made(f"{place.url}/{name}", manifest, left_out, _prune(place, keep) if keep else [])


def _check(data_dir: Path, *, ledger: bool, shards: bool) -> None:
    if not ledger and not shards:
        raise BackupError("Without the ledger and without the shards nothing is left to back up")
    wanted = LEDGER if ledger else SHARDS
    if (data_dir / wanted).exists():
        return
    check_no_stack(data_dir, wanted)
    if ledger and (data_dir / SHARDS).is_dir():
        raise BackupError(
            f"There is no {LEDGER} in {data_dir}. If the ledger is in PostgreSQL, back that up with PostgreSQL's own "
            "tools, and this node's shards with --no-ledger"
        )
    raise BackupError(f"{data_dir} is no data directory of a search service: there is no {wanted} in it")


class _Staging:
    """A directory beside the data for what is being copied, of one process at a time; *path* is free to be made in it."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / STAGING
        self.path = self._directory / "copy"

    def __enter__(self) -> "_Staging":
        try:
            self._claim = Claim(self._directory)
        except Conflict as error:
            raise BackupError(f"Another backup is being made: {error}") from error
        self.clear()  # What an earlier one that was killed left.
        return self

    def clear(self) -> None:
        """Remove what is in it."""
        files.remove(self.path)

    def __exit__(self, *_: object) -> None:
        try:
            files.remove(self._directory)
        finally:
            self._claim.release()


def _send(directory: Path, place: Place, name: str, path: str) -> dict[str, FileMark]:
    sent = {}
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        target = f"{path}/{file.relative_to(directory).as_posix()}"
        sent[target] = place.write(file, name, target)
    return sent


def _prune(place: Place, keep: int) -> list[str]:
    """Remove what is older than the newest *keep* whole backups, half-made ones among it."""
    names = place.names()
    whole = [name for name in names if place.manifest(name) is not None]
    if len(whole) < keep:
        return []
    old = [name for name in names if name < whole[keep - 1]]
    for name in old:
        place.remove(name)
    return old
