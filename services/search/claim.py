"""An exclusive claim on a directory, so that two processes never write the same files."""

import fcntl
import os
from pathlib import Path

from services.common.errors import Conflict

_FILE = ".lock"


class Claim:
    """Held by this process until `release`, or until the process dies."""

    def __init__(self, directory: Path) -> None:
        """
        Claim *directory*, which is made if need be.

        Raises:
            Conflict: Another holder has it; the message names its process.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode("ascii"), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise Conflict(
                f"The directory {directory} is in use by process {holder}: "
                "stop that process, or choose another data directory"
            ) from error
        except OSError:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Give the claim up. The file stays: removing it would race with the next holder."""
        os.close(self._descriptor)
