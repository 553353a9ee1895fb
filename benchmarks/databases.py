"""Vector databases in processes of their own, which answer commands as JSON lines (see peers/vectors/drive.py)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import machine
from benchmarks.servers import ServerFailed
from benchmarks.vectors import Condition, VectorSet

OURS = "tercet"
PEERS = ("chroma", "lancedb", "milvus-lite")

_PEERS_HOME = machine.ROOT / "benchmarks" / "peers" / "vectors"


class Database:
    """One database, from the start of its process to the end of the `with` block, which ends the process."""

    def __init__(self, name: str, directory: Path, vectors: VectorSet, *options: str) -> None:
        """Start *name* with its data in *directory*. Raises ServerFailed where its environment is missing."""
        self.name = name
        python = Path(sys.executable) if name == OURS else _PEERS_HOME / ".venv/bin/python"
        if not python.exists():
            raise ServerFailed(f"{name} is not installed: make bench-peers")
        program = ["-m", "benchmarks.drive"] if name == OURS else [str(_PEERS_HOME / "drive.py"), name]
        files = [str(directory), str(vectors.vectors_file), str(vectors.queries_file)]
        self.log = directory.with_suffix(".log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), *program, *files, *options],
                cwd=machine.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.resume()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and return the answer. Raises ServerFailed when the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ServerFailed(f"{self.name} ended at {do!r}: {self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def search(self, queries: Sequence[int], limit: int, condition: Condition) -> dict[str, Any]:
        """Ask the questions of those numbers one after the other; return `rows` and `seconds` of each."""
        return self.ask("search", queries=list(queries), limit=limit, filter=condition)

    def memory_mb(self) -> dict[str, float]:
        """Return the process's resident memory, and the part of it that no file backs, in MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        wanted = {"VmRSS": "resident", "RssAnon": "anonymous"}
        lines = (line.split() for line in status.splitlines())
        return {wanted[words[0][:-1]]: int(words[1]) / 1000 for words in lines if words[0][:-1] in wanted}

    def pause(self) -> None:
        """Stop the process for a while, so that it takes nothing from another's measurement."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)
