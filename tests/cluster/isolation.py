"""
A network and name resolution of its own for this process and all that it starts: Linux namespaces, without root.

All of 127.0.0.0/8 is then the simulation's, port 80 and 53 included, and getaddrinfo of every process asks its DNS.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAMESERVER = "127.0.0.53"
SEARCH = "tercet.svc.cluster.local svc.cluster.local cluster.local"
# As kubelet writes it.
_FILES = {
    "/etc/resolv.conf": f"nameserver {NAMESERVER}\nsearch {SEARCH}\noptions ndots:5\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
    "/etc/nsswitch.conf": "hosts: files dns\npasswd: files\ngroup: files\n",
}
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1
_SET_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None)


def end_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have this process sent a signal when its parent, which has that number, ends for any reason. Safe between fork and exec."""
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, by)
    if os.getppid() != parent:
        os._exit(1)


def unshare() -> list[str]:
    """Return the command that runs another one in namespaces of its own, as the user who it is run by."""
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return ["unshare", "--mount", "--net", *as_user]


def trouble() -> str | None:
    """Return why namespaces cannot be had here; None where they can."""
    probe = "import socket; s = socket.socket(); s.bind(('0.0.0.0', 80))"
    try:
        done = subprocess.run([*unshare(), sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"no namespaces: {done.stderr.strip()[-200:]}"


def run_isolated(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in namespaces of its own, and return its exit status."""
    process = subprocess.Popen([*unshare(), sys.executable, "-m", module, *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # The other one got it too, and ends its pods first.
            continue


def settle_in(place: Path) -> None:
    """Bring the loopback up and turn name resolution to our DNS. Call it once, in the new namespaces. Raises OSError."""
    end_with(os.getppid(), signal.SIGTERM)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16xH", fcntl.ioctl(control, _GET_FLAGS, struct.pack("16sH14x", b"lo", 0))[:18])[0]
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sH14x", b"lo", flags | _UP))
    for target, content in _FILES.items():
        if Path(target).exists():
            source = place / Path(target).name
            source.write_text(content)
            subprocess.run(["mount", "--bind", str(source), target], check=True)
