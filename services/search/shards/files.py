"""
The one way in which shards write the files of a snapshot, and what is written once and read back later.

Everything here goes through one `Disk`, so that a test can put another in its place: one that runs full, fails at the
n-th step, or forgets what was not synced. A file's contents are safe after `write_file` or `sync_file`; that it is
there under its name is safe only after `sync_directory` of the directory that it is in.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

_CHUNK_BYTES = 1 << 20


class Damaged(Exception):
    """A file that was written earlier is missing, truncated or altered."""


class Disk:
    """What is asked of the operating system, one method for each step that can fail. Raises OSError."""

    def write(self, path: Path, data: bytes) -> None:
        """Write *data* as the whole of *path*."""
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Bring *path*, a file or a directory, to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give *source* the name *target*, in the place of what has it."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give the file *source* a second name."""
        target.hardlink_to(source)

    def remove(self, path: Path) -> None:
        """Remove a file or an empty directory."""
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


_disks = [Disk()]  # the last one is in use


@contextmanager
def replaced_by(disk: Disk) -> Iterator[None]:
    """Let every function of this module work on *disk*, in all threads, until the block ends."""
    _disks.append(disk)
    try:
        yield
    finally:
        _disks.pop()


def write_file(path: Path, data: bytes) -> None:
    """Write *data* as the whole of *path* and sync it."""
    _disks[-1].write(path, data)
    _disks[-1].sync(path)


def sync_file(path: Path) -> None:
    """Bring the contents of *path*, which somebody else has written, to the disk."""
    _disks[-1].sync(path)


def sync_directory(path: Path) -> None:
    """Bring the names of the files in *path* to the disk."""
    _disks[-1].sync(path)


def rename(source: Path, target: Path) -> None:
    """Give *source* the name *target*, in the place of what has it; a reader sees the one or the other."""
    _disks[-1].rename(source, target)


def hard_link(source: Path, target: Path) -> None:
    """Give *source* a second name, or copy and sync it where the file system has no hard links."""
    try:
        _disks[-1].link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK):
            raise
        write_file(target, source.read_bytes())


def remove(path: Path) -> None:
    """Remove *path* with all that is in it; nothing happens where nothing is."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove(child)
    try:
        _disks[-1].remove(path)
    except FileNotFoundError:
        return


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal. Raises Damaged where it cannot be read."""
    digest = sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def read_file(path: Path) -> bytes:
    """Return the contents of *path*. Raises Damaged where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error


def check_file(path: Path, size_bytes: int, digest: str) -> None:
    """Raise Damaged unless *path* has *size_bytes* bytes with the SHA-256 *digest*."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    if found != size_bytes:
        raise Damaged(f"{path.name} has {found} bytes instead of {size_bytes}")
    if sha256_of(path) != digest:
        raise Damaged(f"{path.name} has other contents than were written")
