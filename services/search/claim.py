"""An exclusive claim on a directory or a file, so that two processes never write the same data."""

import fcntl
import os
from pathlib import Path

from services.common.errors import Conflict

LOCK_FILE = ".lock"


class Claim:
    """Held by this process until `release`, or until the process dies."""

    def __init__(self, path: Path, *, what: str = "directory") -> None:
        """
        Claim *path*: a directory, which is made if need be, or for another *what* a file, in whose directory the lock is.

        Raises:
            Conflict: Another holder has it; the message names its process.
        """
        directory = path if what == "directory" else path.parent
        directory.mkdir(parents=True, exist_ok=True)
        lock = path / LOCK_FILE if what == "directory" else path.with_name(path.name + LOCK_FILE)
        self._descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode("ascii"), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise Conflict(
                f"The {what} {path} is in use by process {holder}: stop that process, or choose another data directory"
            ) from error
        except OSError:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Give the claim up. The file stays: removing it would race with the next holder."""
        os.close(self._descriptor)
