"""Starts the servers that are compared, each in a process group of its own, and ends no other process than those."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from services.common.model_files import DEFAULT_MODEL, resolve_model

PEERS = Path(__file__).parent / "peers"
START_PATIENCE_S = 180.0
STOP_PATIENCE_S = 15.0
SETTLE_PATIENCE_S = 30.0
SETTLE_LOOK_S = 0.3
IDLE_SHARE = 0.2  # of one core: less than this is no work under way
_NOT_INHERITED = ("EMBEDDING_", "RERANK_", "SEARCH_", "INFINITY_", "REDIS_")
OURS, INFINITY, NAIVE = "tercet", "infinity", "naive"


class ServerFailed(Exception):
    """A server did not start; the message ends with the last lines it wrote."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How one server is started and spoken to."""

    name: str
    command: Callable[[int], list[str]]
    environ: Callable[[int], dict[str, str]]
    ready_path: str
    path: str
    body: Callable[[Sequence[str], Mapping[str, str]], bytes]


@dataclass
class Running:
    """A server that answers."""

    spec: ServerSpec
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path
    host: str = "127.0.0.1"
    paused: bool = field(default=False, init=False)

    def get(self, path: str) -> Any:
        """Return the JSON that a GET of *path* answers; None for anything but a 200."""
        content = self.read(path)
        return None if content is None else json.loads(content)

    def read(self, path: str) -> bytes | None:
        """Return what a GET of *path* answers; None for anything but a 200."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            content = reply.read()
            return content if reply.status == 200 else None
        finally:
            connection.close()

    def ask(self, texts: Sequence[str]) -> float:
        """Embed *texts* once and return the seconds it took. Raises ServerFailed when the answer is no 200."""
        started = time.perf_counter()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request("POST", self.spec.path, self.spec.body(texts, {}), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read()
            if reply.status != 200:
                raise ServerFailed(f"{self.spec.name} answered {reply.status}: {content[:300]!r}")
            return time.perf_counter() - started
        finally:
            connection.close()

    def wait_until_ready(self) -> None:
        """Wait until it says that it can work. Raises ServerFailed when it ends, or takes too long."""
        give_up_at = time.monotonic() + START_PATIENCE_S
        while time.monotonic() < give_up_at and self.process.poll() is None:
            try:
                if self.get(self.spec.ready_path) is not None:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.1)
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise ServerFailed(f"{self.spec.name} did not start:\n{end}")

    def kill(self) -> None:
        """End all its processes as a crash does."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def freeze(self, *, frozen: bool) -> None:
        """Stop its processes amid what they do, or let them run on."""
        self._signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def pause(self) -> None:
        """
        Stop its processes from running, so that another server's figures are not touched.

        It first finishes what callers who are gone have left it: the next round would pay for that, and a service that
        watches its worker would find, once it runs again, a batch that took minutes.
        """
        if not self.paused:
            self._settle()
            self._signal(signal.SIGSTOP)
            self.paused = True

    def resume(self) -> None:
        """Let it run again."""
        if self.paused:
            self._signal(signal.SIGCONT)
            self.paused = False

    def resident_mb(self) -> float:
        """Return the resident memory (VmRSS) of all processes of its group, in MB of 10^6 bytes."""
        lines = [line for text in self._proc("status") for line in text.splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6

    def stop(self) -> None:
        """End the group: politely, and after a while for good."""
        self.resume()
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_PATIENCE_S)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def wait_until_idle(self, patience_s: float, *, quiet_s: float = 6.0) -> float:
        """Wait until it has done nothing for *quiet_s*; return how many seconds it worked before that."""
        began = time.monotonic()
        while self._settle(patience_s):
            quiet_from = time.monotonic()
            while time.monotonic() - quiet_from < quiet_s and self._idle():
                pass
            if time.monotonic() - quiet_from >= quiet_s:
                return quiet_from - began
        return time.monotonic() - began

    def _settle(self, patience_s: float = SETTLE_PATIENCE_S) -> bool:
        give_up_at = time.monotonic() + patience_s
        while time.monotonic() < give_up_at:
            if self._idle():
                return True
        return False

    def _idle(self) -> bool:
        before_s = self._cpu_s()
        time.sleep(SETTLE_LOOK_S)
        return self._cpu_s() - before_s < SETTLE_LOOK_S * IDLE_SHARE

    def _cpu_s(self) -> float:
        fields = [text.rpartition(")")[2].split() for text in self._proc("stat")]
        return sum(int(user) + int(system) for user, system in (one[11:13] for one in fields)) / os.sysconf(
            "SC_CLK_TCK"
        )

    def _proc(self, name: str) -> Iterator[str]:
        for file in Path("/proc").glob(f"[0-9]*/{name}"):
            with suppress(ProcessLookupError, FileNotFoundError):
                if os.getpgid(int(file.parent.name)) == self.process.pid:
                    yield file.read_text()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def model_directory() -> Path:
    """Return the directory of the model that every server loads."""
    return Path(resolve_model(DEFAULT_MODEL))


def tercet(name: str = OURS, *, model: str = DEFAULT_MODEL, **environ: str) -> ServerSpec:
    """Return our own service with *environ* added to its variables."""

    def body(texts: Sequence[str], fields: Mapping[str, str]) -> bytes:
        return as_json({"inputs": texts[0] if len(texts) == 1 else texts, **fields})

    return ServerSpec(
        name,
        command=lambda port: [sys.executable, "-m", "services.embedding"],
        environ=lambda port: {"EMBEDDING_MODEL": model, "EMBEDDING_LISTEN_PORT": str(port), **environ},
        ready_path="/readyz",
        path="/embed",
        body=body,
    )


def infinity(model: str, path: str, body: Callable[[Sequence[str], Mapping[str, str]], bytes]) -> ServerSpec | None:
    """Return Infinity with *model*, a directory, asked at *path*; None, having said so, where `make bench-peers` was not run."""
    executable = PEERS / "infinity" / ".venv" / "bin" / "infinity_emb"
    if not executable.exists():
        print(f"{INFINITY} is left out: {executable} is missing (`make bench-peers` installs it)")
        return None
    options = f"--engine torch --device cpu --no-vector-disk-cache --host 127.0.0.1 --model-id {model}".split()
    return ServerSpec(
        INFINITY,
        command=lambda port: [str(executable), "v2", *options, "--port", str(port)],
        environ=lambda port: {"INFINITY_ANONYMOUS_USAGE_STATS": "0"},
        ready_path="/health",
        path=path,
        body=body,
    )


def peers() -> list[ServerSpec]:
    """Return the peers that `make bench-peers` has prepared; say which are missing."""
    model = str(model_directory())
    naive = ServerSpec(
        NAIVE,
        command=lambda port: [sys.executable, "-m", "uvicorn", "benchmarks.peers.naive.app:app", "--port", str(port)],
        environ=lambda port: {"MODEL": model},
        ready_path="/health",
        path="/embed",
        body=lambda texts, fields: as_json({"texts": list(texts)}),
    )
    found = infinity(model, "/embeddings", lambda texts, fields: as_json({"input": list(texts), "model": model}))
    return [naive] if found is None else [found, naive]


@contextmanager
def running(specs: Sequence[ServerSpec], directory: Path) -> Iterator[dict[str, Running]]:
    """Start *specs* one after the other, their output in *directory*, and give them, paused, by name; stop them at the end."""
    with ExitStack() as stack:
        servers = {}
        for spec in specs:
            server = start(spec, directory / f"{spec.name}.log")
            stack.callback(server.stop)
            server.wait_until_ready()
            server.pause()
            servers[spec.name] = server
        yield servers


@contextmanager
def alone(servers: Mapping[str, Running], name: str) -> Iterator[Running]:
    """Let only the server *name* run for a while."""
    server = servers[name]
    server.resume()
    try:
        yield server
    finally:
        server.pause()


def free_port() -> int:
    """Return a port of this machine that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(spec: ServerSpec, log: Path, port: int | None = None) -> Running:
    """Start *spec* on *port*, or a free one, with its output in *log*, and do not wait."""
    port = port or free_port()
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            spec.command(port),
            cwd=ROOT,
            env={**inherited(), **offline, **spec.environ(port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(spec, port, process, log)


def inherited() -> dict[str, str]:
    """Return this process's variables without those that set up a service: every server is told all that it is to know."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}


def as_json(value: object) -> bytes:
    """Return *value* as compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()
