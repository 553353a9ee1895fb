"""A search service as a process of its own."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

_START_PATIENCE_S = 60.0


class SearchProcess:
    """`python -m services.search` on *data_dir* and a free port; *environ* are more variables for it."""

    def __init__(self, data_dir: Path, **environ: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SEARCH_")}
        own = {"SEARCH_DATA_DIR": str(data_dir), "SEARCH_LISTEN_PORT": str(self._port)}
        self._environ = {**inherited, **own, **environ}
        self.log = data_dir.with_suffix(".log")

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "services.search"]
            self._process = subprocess.Popen(command, env=self._environ, stdout=log, stderr=log)
        give_up_at = time.monotonic() + _START_PATIENCE_S
        while time.monotonic() < give_up_at and self._process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                if self.call("GET", "/readyz")[0] == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"it did not start: {self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        """End it in order."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(60) == 0, self.log.read_text(errors="replace")[-3000:]

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return the status and the JSON of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            content = None if body is None else orjson.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"})
            reply = connection.getresponse()
            raw = reply.read()
            return reply.status, orjson.loads(raw) if raw else None
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of a request that must succeed."""
        status, answer = self.call(method, path, body)
        assert status < 300, (path, status, answer)
        return answer
