"""One service as a child process: started, watched, restarted with back-off when it exits, and stopped."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2

MAX_BACKOFF_S = 15.0
STABLE_AFTER_S = 30.0
MAX_LOG_BYTES = 10 * 1024 * 1024
_POLL_S = 0.1
_LIFE_POLL_S = 2.0
_SAID_DEAD = 2  # Times in a row that a service must say on /livez that it cannot work any more.
_PROBE_TIMEOUT_S = 2.0
_ERROR_TAIL_LINES = 6
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ServiceFailed(Exception):
    """A service ended before it was ever ready; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """What to run, with which environment, where it answers, and the file that takes what it prints."""

    name: str
    command: tuple[str, ...]
    environ: dict[str, str]
    url: str
    log: Path


@dataclass(frozen=True, slots=True)
class Event:
    """
    Something happened to a service.

    *seconds* is how long it took to get ready, or was up before it exited. An exit has a *status* (a negative one is
    the signal that ended it, None says that it could not even be started) and the time until it is started again.
    """

    kind: Literal["starting", "ready", "exited"]
    service: str
    seconds: float = 0.0
    status: int | None = None
    restart_in_s: float | None = None


class Supervised:
    """A service that is kept running between `start` and `stop`."""

    def __init__(self, spec: ServiceSpec, on_event: Callable[[Event], None], *, first_backoff_s: float = 0.5) -> None:
        self.spec = spec
        self.is_ready = False
        self._on_event = on_event
        self._first_backoff_s = first_backoff_s
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """
        Start the service, return when it is ready, and keep it running from then on.

        Raises:
            ServiceFailed: It ended before it was ready: a setting is wrong or the model cannot be loaded.
        """
        started = time.monotonic()
        process = await self._spawn()
        if not await self._wait_until_ready(process, started):
            raise ServiceFailed(
                f"the {self.spec.name} service ended while starting ({describe_exit(process.returncode)}):\n"
                f"{_tail(self.spec.log)}\nits log is {self.spec.log}"
            )
        self._watch = asyncio.create_task(self._keep_running(process, started), name=f"watch-{self.spec.name}")

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end, and kill it with what it started if it has not after *grace_s*."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
            self._watch = None
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                _kill_group(process.pid)
                await process.wait()
        # Nor may anything that it started outlive it.
        _kill_group(process.pid)
        self._process = None
        self.is_ready = False

    async def _keep_running(self, process: asyncio.subprocess.Process | None, started: float) -> None:
        backoff_s = self._first_backoff_s
        readiness: asyncio.Task[bool] | None = None
        life: asyncio.Task[None] | None = None
        try:
            while True:
                if process is not None:
                    life = asyncio.create_task(self._end_when_dead(process))
                status = await process.wait() if process else None
                self.is_ready = False
                for task in (readiness, life):
                    if task is not None:
                        task.cancel()
                if process is not None:
                    _kill_group(process.pid)
                up_s = time.monotonic() - started
                if up_s >= STABLE_AFTER_S:
                    backoff_s = self._first_backoff_s
                self._on_event(Event("exited", self.spec.name, up_s, status, backoff_s))
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                started = time.monotonic()
                process = None
                # A full disk or process table may have passed by the next attempt.
                with contextlib.suppress(OSError):
                    process = await self._spawn()
                    readiness = asyncio.create_task(self._wait_until_ready(process, started))
        finally:
            for task in (readiness, life):
                if task is not None:
                    task.cancel()

    async def _end_when_dead(self, process: asyncio.subprocess.Process) -> None:
        """Kill *process* once it says of itself that it cannot work any more: its model hangs, or its worker died."""
        said = 0
        async with httpx2.AsyncClient(trust_env=False, timeout=_PROBE_TIMEOUT_S) as http:
            while process.returncode is None and said < _SAID_DEAD:
                await asyncio.sleep(_LIFE_POLL_S)
                with contextlib.suppress(httpx2.HTTPError):
                    said = said + 1 if (await http.get(f"{self.spec.url}/livez")).status_code == 503 else 0
        if process.returncode is None:
            _kill_group(process.pid)

    async def _spawn(self) -> asyncio.subprocess.Process:
        _rotate(self.spec.log)
        parent = os.getpid()
        with self.spec.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.spec.environ,
                # A session of its own: Ctrl-C on the terminal reaches only the supervisor, which stops its children.
                start_new_session=True,
                preexec_fn=(lambda: _end_with(parent)) if _libc else None,
            )
        self._on_event(Event("starting", self.spec.name))
        return self._process

    async def _wait_until_ready(self, process: asyncio.subprocess.Process, started: float) -> bool:
        """Return True when the service takes requests, or False once *process* has ended."""
        async with httpx2.AsyncClient(trust_env=False, timeout=_PROBE_TIMEOUT_S) as http:
            while process.returncode is None:
                with contextlib.suppress(httpx2.HTTPError):
                    if (await http.get(f"{self.spec.url}/readyz")).is_success:
                        self.is_ready = True
                        self._on_event(Event("ready", self.spec.name, time.monotonic() - started))
                        return True
                await asyncio.sleep(_POLL_S)
        return False


def describe_exit(status: int | None) -> str:
    """Return an exit status in words."""
    if status is None:
        return "could not be started"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _end_with(parent: int) -> None:
    """In the child: have Linux send SIGTERM when the parent dies, however it dies (elsewhere there is no such thing)."""
    assert _libc is not None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _rotate(log: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))


def _tail(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 16_384))
        lines = stream.read().decode(errors="replace").splitlines()
    return "\n".join(line[:500] for line in lines[-_ERROR_TAIL_LINES:])
