"""Where backups are kept: a directory here, or whatever fsspec opens by its URL."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import get_filesystem_class
from pydantic import ValidationError

from services.search.offline.errors import BackupError
from services.search.offline.layout import FORMAT, MANIFEST, BackupManifest, is_name
from services.search.shards import files
from services.search.shards.snapshot import FileMark

_CHUNK_BYTES = 4 << 20


class Place:
    """Backups below a URL, each in a folder named by its time. Methods raise BackupError where the place fails."""

    def __init__(self, url: str) -> None:
        """
        Open *url*, such as a directory, file:///…, memory://… or s3://bucket/prefix.

        Raises:
            BackupError: The protocol is not known, or its package is not installed.
        """
        self.url = url.rstrip("/") or url
        protocol = url.partition("://")[0] if "://" in url else "file"
        try:
            local = get_filesystem_class(protocol) is LocalFileSystem
        except ImportError as error:
            raise BackupError(f"{protocol}:// needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise BackupError(f"{url} cannot be opened: no protocol {protocol}:// is known") from error
        with self._told("opened"):
            self._fs, self._root = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if local else {}))
        self._local = local

    def names(self) -> list[str]:
        """Return the names of all backups, whole or not, the newest first."""
        with self._told("listed"):
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            found = (str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False))
            return sorted(filter(is_name, found), reverse=True)

    def split(self) -> "tuple[Place, str | None]":
        """Return the place and the backup's name, where the URL is that of one backup; else this and None."""
        above, _, name = self.url.rpartition("/")
        if is_name(name):
            return Place(above or "/"), name
        return self, None

    def manifest(self, name: str) -> BackupManifest | None:
        """
        Return the manifest of a backup; None: it has none that can be read, so it is not whole.

        Raises:
            BackupError: A newer Tercet wrote it.
        """
        with self._told("read"):
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{name}/{MANIFEST}")
            except FileNotFoundError:
                return None
        try:
            found = BackupManifest.model_validate_json(data)
        except ValidationError:
            return None
        if found.format != FORMAT:
            raise BackupError(f"{self.url}/{name} has format {found.format}, and this Tercet reads format {FORMAT}")
        return found

    def write(self, source: Path, name: str, path: str) -> FileMark:
        """Copy the file *source* into a backup as *path*, and return what was written."""
        digest, size = sha256(), 0
        with self._told("written"), source.open("rb") as read, self._writing(f"{name}/{path}") as write:
            while chunk := read.read(_CHUNK_BYTES):
                write.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        return FileMark(sha256=digest.hexdigest(), bytes=size)

    def finish(self, name: str, manifest: BackupManifest) -> None:
        """Write the manifest of a backup, whose files are all written: now it is whole."""
        with self._told("written"):
            self._sync(name)
            with self._writing(f"{name}/{MANIFEST}") as write:
                write.write(manifest.model_dump_json(indent=1).encode())
            self._sync(name)

    def read(self, name: str, path: str, target: Path, mark: FileMark) -> None:
        """Copy a file of a backup to *target*, synced. Raises BackupError where it is not what was written."""
        digest, size = sha256(), 0
        url = f"{self.url}/{name}/{path}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._told("read"), target.open("wb") as write:
            try:
                with self._fs.open(f"{self._root}/{name}/{path}", "rb") as read:
                    while chunk := read.read(_CHUNK_BYTES):
                        write.write(chunk)
                        digest.update(chunk)
                        size += len(chunk)
            except FileNotFoundError as error:
                raise BackupError(f"The backup is damaged: {url} is missing") from error
            write.flush()
            os.fsync(write.fileno())
        if size != mark.bytes:
            raise BackupError(f"The backup is damaged: {url} has {size} bytes instead of {mark.bytes}")
        if digest.hexdigest() != mark.sha256:
            raise BackupError(f"The backup is damaged: {url} has other contents than were written")

    def remove(self, name: str) -> None:
        """Remove a backup, its manifest first, so that what a failure leaves is not taken for whole."""
        with self._told("removed"):
            whole = f"{self._root}/{name}/{MANIFEST}"
            if self._fs.exists(whole):
                self._fs.rm_file(whole)
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    @contextmanager
    def _writing(self, path: str) -> Iterator[Any]:
        with self._fs.open(f"{self._root}/{path}", "wb") as write:
            yield write
            if self._local:
                write.flush()
                os.fsync(write.fileno())

    def _sync(self, name: str) -> None:
        """Bring the names of a backup's files to the disk, where that is ours to do."""
        if self._local:
            top = Path(self._root, name)
            for directory in (*(path for path in top.rglob("*") if path.is_dir()), top, top.parent):
                files.sync_directory(directory)

    @contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Let whatever the place's own library raises become an error that says which place it is."""
        try:
            yield
        except BackupError:
            raise
        except Exception as error:  # Each library has exceptions of its own, which it does not document.
            raise BackupError(f"{self.url} could not be {done}: {error}") from error
