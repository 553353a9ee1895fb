"""
A disk whose power can be cut, as a SQLite VFS: it knows of every file what was synced and what was not.

Files lie in a real directory, so that locks and shared memory are real. A power cut replaces them by what a disk could
hold: what was synced, with nothing of what was not, or with some of it and one write torn.
"""

import random
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import apsw

Change = tuple[int, bytes | None]  # Bytes written at an offset; None cuts the file off there.
Fault = Callable[[str], Exception | None]


@dataclass
class _Kept:
    """
    A file as a power cut would find it: *synced* (None: no such name yet), and what came after, in order.

    Until its directory is synced, a file that was *removed*, or *replaced* by a new one, may come back.
    """

    synced: bytes | None
    changes: list[Change] = field(default_factory=list)
    removed: bool = False
    replaced: bool = False

    def now(self) -> bytes:
        """What a program reads."""
        content = bytearray(b"" if self.replaced else self.synced or b"")
        for change in self.changes:
            _apply(content, change)
        return bytes(content)


class Disk:
    """
    A registered VFS called *name*. It counts the operations that change a file, or sync it.

    From operation number *cut_at* on there is no power: none happens, but that one may have begun. *fault* is asked
    before each operation, by its kind, for an error to raise instead.
    """

    def __init__(self, seed: int) -> None:
        self.name = f"disk-{uuid.uuid4()}"
        self.operations = 0
        self.cut_at: int | None = None
        self.fault: Fault | None = None
        self._chance = random.Random(seed)
        self._files: dict[str, _Kept] = {}
        self._lock = threading.RLock()
        self._vfs = _Vfs(self)

    def settle(self) -> None:
        """Leave in the directory what a power cut leaves at this moment, and let operations succeed again."""
        with self._lock:
            some_survive = self._chance.random() < 0.7
            for name, kept in self._files.items():
                content = self._after_cut(kept, some_survive)
                if content is None:
                    Path(name).unlink(missing_ok=True)
                else:
                    Path(name).write_bytes(content)
                Path(f"{name}-shm").unlink(missing_ok=True)
            self._files.clear()
            self.cut_at = None

    def remove(self) -> None:
        """Unregister the VFS."""
        self._vfs.unregister()

    def _after_cut(self, kept: _Kept, some_survive: bool) -> bytes | None:
        if kept.removed and some_survive and self._chance.random() < 0.5:
            return None
        if not some_survive:
            return kept.synced
        survivors = [change for change in kept.changes if self._chance.random() < 0.6]
        content = bytearray(b"" if kept.replaced else kept.synced or b"")
        torn = self._chance.randrange(len(survivors)) if survivors else -1
        for number, (offset, data) in enumerate(survivors):
            if number == torn and data is not None:
                data = data[: self._chance.randrange(len(data) + 1)]
            _apply(content, (offset, data))
        return bytes(content) if survivors else kept.synced

    # --- what the VFS reports; each may raise instead of letting it happen

    def note_open(self, name: str) -> None:
        with self._lock:
            path = Path(name)
            kept = self._files.get(name)
            if kept is None:
                self._files[name] = _Kept(path.read_bytes() if path.exists() else None)
            elif kept.removed:
                self._files[name] = _Kept(kept.synced, replaced=True)

    def note_change(self, name: str, change: Change) -> None:
        with self._lock:
            kept = self._files[name]
            if self.operations + 1 == self.cut_at:
                kept.changes.append(change)
            self._step("write" if change[1] is not None else "truncate")
            kept.changes.append(change)

    def note_sync(self, name: str) -> None:
        with self._lock:
            self._step("sync")
            self._files[name] = _Kept(self._files[name].now())

    def note_directory_sync(self, _path: Path) -> None:
        """Let what names there are now survive; stands for the ledger's own syncing of its directory."""
        with self._lock:
            self._step("sync")
            for name, kept in self._files.items():
                if kept.removed:
                    self._files[name] = _Kept(None, removed=True)
                elif kept.replaced or kept.synced is None:
                    self._files[name] = _Kept(b"", kept.changes)

    def note_delete(self, name: str, synced: bool) -> None:
        with self._lock:
            self._step("delete")
            if synced:
                self._files[name] = _Kept(None, removed=True)
            elif name in self._files:
                self._files[name].removed = True

    def _step(self, what: str) -> None:
        self.operations += 1
        if self.cut_at is not None and self.operations >= self.cut_at:
            raise apsw.IOError("there is no power")
        error = self.fault(what) if self.fault else None
        if error is not None:
            raise error


def _apply(content: bytearray, change: Change) -> None:
    offset, data = change
    if data is None:
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class _Vfs(apsw.VFS):
    """The default VFS, with every file that is written under the eyes of a disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        super().__init__(disk.name, "")

    def xOpen(self, name, flags):
        if name is None:
            return super().xOpen(name, flags)
        return _File(self._disk, name, flags)

    def xDelete(self, filename, syncdir):
        self._disk.note_delete(filename, bool(syncdir))
        super().xDelete(filename, syncdir)

    def excepthook(self, etype, evalue, etraceback) -> None:
        """Say nothing: the errors raised here are meant."""


class _File(apsw.VFSFile):
    """A file that reports its changes to a disk before it makes them."""

    def __init__(self, disk: Disk, name, flags) -> None:
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name
        disk.note_open(self._name)
        super().__init__("", name, flags)

    def xWrite(self, data, offset):
        self._disk.note_change(self._name, (offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, newsize):
        self._disk.note_change(self._name, (newsize, None))
        super().xTruncate(newsize)

    def xSync(self, flags):
        self._disk.note_sync(self._name)  # Nothing is synced for real: the power that is cut is ours.

    def excepthook(self, etype, evalue, etraceback) -> None:
        """Say nothing: the errors raised here are meant."""
