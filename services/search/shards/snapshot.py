"""
Snapshots of one shard on disk: `snapshots/<name>/` with a manifest and files, and `CURRENT`, which names the newest.

A snapshot comes into being whole: its files are written into a directory of another name, synced, and the directory
renamed. The vectors' files are not copied: the snapshot names them, and they stay where they are while it does.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any

import orjson
import structlog
from pydantic import BaseModel, ConfigDict
from pyroaring import BitMap

from services.common.errors import Conflict
from services.search.ports import Collection
from services.search.shards import files
from services.search.shards.contents import Frozen
from services.search.shards.files import Damaged

FORMAT = 1
KEPT = 2
LEXICAL = "lexical"

_MANIFEST, _CURRENT, _DIRECTORY, _NEW = "manifest.json", "CURRENT", "snapshots", ".new"
_IDS, _LIVE, _ATTRIBUTES = "ids.bin", "live.bin", "attributes.bin"

_log = structlog.get_logger(__name__)


class FileMark(BaseModel):
    """How long a file is and what is in it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What a snapshot is of and what belongs to it. *seq* is the one place that says how far it is true."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: int
    collection: str
    shard: int
    shards: int
    dim: int
    metric: str
    fingerprint: str
    epoch: str
    seq: int
    next_row: int
    documents: int
    created_at: float
    store_token: str
    store_seq: int
    files: dict[str, FileMark]
    vectors: dict[str, Any]
    vector_files: list[str]
    lexical: dict[str, Any]

    def check(self, collection: Collection, number: int) -> None:
        """
        Do nothing if this is of that shard.

        Raises:
            Damaged: It is of another one.
            Conflict: The collection had another number of shards then.
        """
        if self.format != FORMAT:
            raise Damaged(f"it has format {self.format}, and this Tercet reads format {FORMAT}")
        if self.collection == collection.uuid and self.shards != collection.shards:
            raise Conflict(
                f"The collection {collection.name!r} was made with {self.shards} shards, and not with "
                f"{collection.shards}: the number of a collection's shards is fixed. Set it back, or reindex into a "
                "new collection with the number you want and let an alias mean that one"
            )
        mine = (self.collection, self.shard, self.dim, self.metric)
        if mine != (collection.uuid, number, collection.dim, collection.metric):
            raise Damaged("it is of another shard or collection")


class SnapshotContent(BaseModel):
    """The files of a snapshot that are its own."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    ids: bytes
    attributes: bytes
    live: BitMap


class Snapshots:
    """The snapshots in a shard's directory. One thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._root = directory
        self._directory = directory / _DIRECTORY
        self._vector_files: dict[str, frozenset[str]] = {}

    def names(self) -> list[str]:
        """Return the names of the snapshots that may be loaded, the best first."""
        found = sorted((path.name for path in self._directory.glob("*") if path.suffix != _NEW), reverse=True)
        try:
            current = (self._root / _CURRENT).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return found
        return sorted(found, key=lambda name: name != current)

    def lexical_directory(self, name: str) -> Path:
        """Return where the words' files of a snapshot are."""
        return self._directory / name / LEXICAL

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a snapshot. Raises Damaged."""
        data = files.read_file(self._directory / name / _MANIFEST)
        try:
            body = orjson.loads(data)
            if body.pop("checksum") != _checksum(body):
                raise Damaged(f"{_MANIFEST} has other contents than were written")
            return Manifest.model_validate(body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{_MANIFEST} cannot be read: {error}") from error

    def content(self, name: str, manifest: Manifest) -> SnapshotContent:
        """Return what is in the files of a snapshot. Raises Damaged."""
        read = {}
        for file in (_IDS, _LIVE, _ATTRIBUTES):
            data = files.read_file(self._directory / name / file)
            if file not in manifest.files or _mark(data) != manifest.files[file]:
                raise Damaged(f"{file} has other contents than were written")
            read[file] = data
        live = BitMap.deserialize(read[_LIVE])
        if len(live) != manifest.documents or (live and live.max() >= manifest.next_row):
            raise Damaged(f"{_LIVE} does not fit the manifest")
        return SnapshotContent(ids=read[_IDS], attributes=read[_ATTRIBUTES], live=live)

    def adopt(self, name: str, manifest: Manifest) -> None:
        """Note that a snapshot is good: the files it names are needed."""
        self._vector_files[name] = frozenset(manifest.vector_files)

    def discard(self, name: str) -> None:
        """Remove a snapshot."""
        self._vector_files.pop(name, None)
        files.remove(self._directory / name)

    def clear(self) -> None:
        """Remove all of them."""
        self._vector_files.clear()
        files.remove(self._root / _CURRENT)
        files.remove(self._directory)

    def tidy(self) -> None:
        """Remove what attempts that did not end left behind."""
        for path in self._directory.glob(f"*{_NEW}"):
            files.remove(path)

    def needed_vector_files(self) -> frozenset[str]:
        """Return the names of the vectors' files that some snapshot needs."""
        return frozenset[str]().union(*self._vector_files.values())

    def begin(self) -> Path:
        """Return a new directory for a snapshot, with one in it for the words. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self.tidy()
        numbers = [int(path.name) for path in self._directory.glob("*") if path.name.isdecimal()]
        path = self._directory / f"{max(numbers, default=0) + 1:08d}{_NEW}"
        (path / LEXICAL).mkdir(parents=True)
        return path

    def finish(self, path: Path, collection: Collection, number: int, epoch: str, frozen: Frozen) -> None:
        """
        Write what was frozen into *path*, which `begin` made, and let that be the current snapshot.

        Raises OSError; the snapshots that were there are there still then.
        """
        contents = {
            _IDS: frozen.ids,
            _LIVE: frozen.view.live.serialize(),
            _ATTRIBUTES: frozen.attributes,
        }
        manifest = Manifest(
            format=FORMAT,
            collection=collection.uuid,
            shard=number,
            shards=collection.shards,
            dim=collection.dim,
            metric=collection.metric,
            fingerprint=collection.fingerprint,
            epoch=epoch,
            seq=frozen.view.applied_seq,
            next_row=frozen.next_row,
            documents=len(frozen.view.live),
            created_at=time(),
            store_token=frozen.mark.token,
            store_seq=frozen.mark.seq,
            files={name: _mark(data) for name, data in contents.items()},
            vectors=frozen.vectors,
            vector_files=list(frozen.vector_files),
            lexical=frozen.lexical,
        )
        body = manifest.model_dump(mode="json")
        contents[_MANIFEST] = orjson.dumps(
            body | {"checksum": _checksum(body)}, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
        )
        for name, data in contents.items():
            files.write_file(path / name, data)
        files.sync_directory(path / LEXICAL)
        files.sync_directory(path)
        name = path.stem
        files.rename(path, self._directory / name)
        self.adopt(name, manifest)
        files.sync_directory(self._directory)
        files.sync_directory(self._root)
        files.write_file(self._root / f"{_CURRENT}{_NEW}", name.encode("ascii"))
        files.rename(self._root / f"{_CURRENT}{_NEW}", self._root / _CURRENT)
        files.sync_directory(self._root)
        self._prune(name)

    def _prune(self, current: str) -> None:
        """Remove all but *current* and the newest of the others; what cannot be removed is left for the next time."""
        others = [name for name in self.names() if name != current]
        for name in others[KEPT - 1 :]:
            try:
                self.discard(name)
            except OSError as error:
                _log.warning("snapshot_not_removed", snapshot=str(self._directory / name), error=str(error))


def _mark(data: bytes) -> FileMark:
    return FileMark(sha256=sha256(data).hexdigest(), bytes=len(data))


def _checksum(body: Mapping[str, Any]) -> str:
    return sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
