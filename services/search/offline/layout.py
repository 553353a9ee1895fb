"""Where things are: in a data directory, and in a backup of one, which has the same files and a manifest."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from services.search.offline.errors import OfflineError
from services.search.shards.snapshot import FileMark

LEDGER, SHARDS = "ledger.db", "shards"
MANIFEST = "manifest.json"
FORMAT = 1

_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z")


def new_name() -> str:
    """Return the name of a backup that begins now: the time in UTC, to the millisecond."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"[:-3] + "Z"


def is_name(name: str) -> bool:
    """Whether a backup may have that name."""
    return _NAME.fullmatch(name) is not None


def check_no_stack(directory: Path, wanted: str) -> None:
    """Raise OfflineError where *directory* is not a data directory but a whole stack's folder, with *wanted* further in."""
    if not (directory / wanted).exists() and (directory / "search" / wanted).exists():
        raise OfflineError(f"{directory} is the folder of a whole stack: --data-dir {directory / 'search'} is meant")


def _relative(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or parts[0] not in (LEDGER, SHARDS):
        raise ValueError(f"{path!r} is no path in a data directory")
    return path


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class CollectionMark(_Part):
    """A collection in the ledger: how many documents it has, and its last operation."""

    uuid: str
    name: str
    documents: int
    seq: int


class ShardMark(_Part):
    """A shard's snapshot: the operation that it is true for."""

    collection: str
    shard: int
    documents: int
    seq: int


class BackupManifest(_Part):
    """
    What a backup holds; it is written last, so that a backup that has one is whole.

    *files* are all of its files by their path, the same in the backup and in a data directory. *collections* are those
    of the ledger; None: the ledger is not in it.
    """

    format: int
    made_at: str
    collections: list[CollectionMark] | None
    shards: list[ShardMark]
    files: dict[Annotated[str, AfterValidator(_relative)], FileMark]

    @property
    def size_bytes(self) -> int:
        """How much there is to read."""
        return sum(mark.bytes for mark in self.files.values())
