"""Our services as processes of their own: started, asked, frozen, stopped, killed."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

START_PATIENCE_S = 60.0


class ServiceProcess:
    """
    `python -m services.<service>` on a free port, with *environ* besides; it writes *log*.

    Nothing is started before `start` or `spawn`; whenever it is started again it has the same port.
    """

    def __init__(self, service: str, log: Path, **environ: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        prefixes = ("SEARCH_", "EMBEDDING_", "RERANK_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
        inherited.pop("REDIS_URL", None)
        self.environ = {**inherited, f"{service.upper()}_LISTEN_PORT": str(self.port), **environ}
        self.service = service
        self.command = [sys.executable, "-m", f"services.{service}"]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The running process's number."""
        assert self.process is not None
        return self.process.pid

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it and do not wait."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environ, stdout=log, stderr=log)
        return self.process

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.spawn()
        self.until_ready()

    def until_ready(self) -> None:
        """Wait until the spawned process says that it is ready."""
        process = self.process
        assert process is not None
        give_up_at = time.monotonic() + START_PATIENCE_S
        while time.monotonic() < give_up_at and process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                if self.call("GET", "/readyz")[0] == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"it did not start: {self.written()[-3000:]}")

    def written(self) -> str:
        """Return its log so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it as a crash does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """Let it do nothing at all until `thaw`; its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it as an operator does; it must end well."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(60)
        assert status == 0, f"status {status}: {self.written()[-3000:]}"

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> tuple[int, Any]:
        """Return the status and the JSON of one request; bytes are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            content = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json", **(headers or {})})
            reply = connection.getresponse()
            raw = reply.read()
            return reply.status, orjson.loads(raw) if raw else None
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Return the JSON of a request that must succeed."""
        status, answer = self.call(method, path, body, **options)
        assert status < 300, (path, status, answer)
        return answer


class SearchProcess(ServiceProcess):
    """The search service on *data_dir*; writes *log*, beside the directory."""

    def __init__(self, data_dir: Path, log: Path | None = None, **environ: str) -> None:
        place = {"SEARCH_DATA_DIR": str(data_dir)}
        super().__init__("search", log or data_dir.with_name(f"{data_dir.name}.log"), **place, **environ)
        self.data_dir = data_dir
