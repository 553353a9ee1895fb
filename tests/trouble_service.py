"""The search service as a real process with small segments: started, asked, measured, stopped, killed."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

START_PATIENCE_S = 60.0
DIM = 8

# So small that a few hundred documents are sealed, merged and written to snapshots.
SMALL = {"SEARCH_TAIL_ROWS": "64", "SEARCH_HNSW_ROWS": "300", "SEARCH_MAINTENANCE_SHARE": "1"}


def vector_of(number: int, version: int = 0) -> list[float]:
    """Return a unit vector that only this version of a document has."""
    vector = np.random.default_rng([number, version]).standard_normal(DIM)
    found: list[float] = (vector / np.linalg.norm(vector)).tolist()
    return found


def document(number: int, version: int = 0, **fields: Any) -> dict[str, Any]:
    """Return document `d<number>`, with a word and a vector that only this version has."""
    return {
        "id": f"d{number}",
        "text": f"word{number}x{version} and some more",
        "metadata": {"number": number, "version": version},
        "vector": vector_of(number, version),
        **fields,
    }


class TroubledService:
    """`python -m services.search` on *data_dir*; nothing is started before `start` or `spawn`."""

    def __init__(self, data_dir: Path, log: Path, **environ: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SEARCH_")}
        inherited.pop("REDIS_URL", None)
        own = {"SEARCH_DATA_DIR": str(data_dir), "SEARCH_LISTEN_PORT": str(self.port)}
        self.environ = {**inherited, **SMALL, **own, **environ}
        self.data_dir = data_dir
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running process's number."""
        assert self.process is not None
        return self.process.pid

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it and do not wait."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "services.search"]
            self.process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log)
        return self.process

    def start(self) -> None:
        """Start it and wait until it is ready."""
        process = self.spawn()
        give_up_at = time.monotonic() + START_PATIENCE_S
        while time.monotonic() < give_up_at and process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
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

    def stop(self) -> None:
        """End it as an operator does; it must end well."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(60) == 0, self.written()[-3000:]

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

    def search(self, number: int, version: int = 0, collection: str = "c", **options: Any) -> Any:
        """Return the answer to a hybrid search for one version of a document by its word and its vector."""
        question = {"query": f"word{number}x{version}", "query_vector": vector_of(number, version), "k": 1}
        question |= {"collection": collection, "rerank": False, "cache": False}
        return self.ask("POST", "/search", question | options)

    def write(self, numbers: Sequence[int], version: int = 0, *, wait: str = "applied", collection: str = "c") -> Any:
        """Write documents of one version; return the reply to the last batch."""
        answer = None
        for start in range(0, len(numbers), 500):
            documents = [document(number, version) for number in numbers[start : start + 500]]
            answer = self.ask("POST", f"/collections/{collection}/documents?wait={wait}", {"documents": documents})
            assert answer["accepted"] == len(documents), answer
        return answer

    # --- what it holds

    @property
    def rss_bytes(self) -> int:
        """The memory that is resident now."""
        with open(f"/proc/{self.pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))

    @property
    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    @property
    def open_files(self) -> int:
        """How many file handles it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextlib.contextmanager
def searching(data_dir: Path, **environ: str) -> Iterator[TroubledService]:
    """Run the service on *data_dir*, its log beside that, and yield it; whatever runs at the end is killed."""
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    service = TroubledService(data_dir, data_dir.with_name(f"{data_dir.name}.log"), **environ)
    service.start()
    try:
        yield service
    finally:
        if service.process is not None and service.process.poll() is None:
            service.kill()


def until(holds: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait until *holds()*; fail where it does not."""
    give_up_at = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up_at, "it never came about"
        time.sleep(0.05)
