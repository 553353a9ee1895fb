"""
The three services as supervised child processes on this machine, with everything they write in one folder.

`<data_dir>/logs/<service>.log` has what each printed, `<data_dir>/stack.lock` keeps a second stack out, and
`<data_dir>/stack.json` says for as long as the stack runs where it can be reached.
"""

import asyncio
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tercet.supervision import Event, ServiceSpec, Supervised

SERVICES = ("embedding", "rerank", "search")
LOOPBACK = "127.0.0.1"
STATE_FILE = "stack.json"
_LOCK_FILE = "stack.lock"


class StackError(Exception):
    """The stack cannot run as it was asked to; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The port of each service; 0 picks a free one."""

    search: int = 8000
    embedding: int = 8001
    rerank: int = 8002

    def of(self, service: str) -> int:
        """Return *service*'s port."""
        return int(getattr(self, service))


@dataclass(frozen=True, slots=True)
class StackState:
    """What `stack.json` says of a running stack: its process, and each service's process and address."""

    pid: int
    urls: dict[str, str]
    pids: dict[str, int | None]


def read_state(data_dir: Path) -> StackState | None:
    """Return what runs on *data_dir*, or None if nothing does."""
    try:
        entry = json.loads((data_dir / STATE_FILE).read_text())
        state = StackState(
            pid=entry["pid"],
            urls={name: service["url"] for name, service in entry["services"].items()},
            pids={name: service["pid"] for name, service in entry["services"].items()},
        )
        os.kill(state.pid, 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state


class LocalStack:
    """
    Embedding, rerank and search on this machine; use it as an async context manager, or `start` and `stop` it.

    *environ* is what the services inherit; addresses, the data folder and JSON logs are filled in. *api_key* is the key of
    all three, where their variables name no other. *host* is search's address; the other two listen on loopback unless
    their variables say otherwise. *commands* replaces what is run.
    *on_event* hears of every start, readiness, exit and restart.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        environ: Mapping[str, str],
        ports: Ports = Ports(),
        host: str = LOOPBACK,
        api_key: str | None = None,
        commands: Mapping[str, Sequence[str]] | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        ready_timeout_s: float = 300.0,
        grace_s: float = 15.0,
        first_backoff_s: float = 0.5,
    ) -> None:
        self.data_dir = data_dir
        self._environ = environ
        self._ports = ports
        self._host = host
        self._api_key = api_key
        self._commands = commands or {name: service_command(name) for name in SERVICES}
        self._on_event = on_event
        self._ready_timeout_s = ready_timeout_s
        self._grace_s = grace_s
        self._first_backoff_s = first_backoff_s
        self._services: dict[str, Supervised] = {}
        self._lock: IO[str] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def urls(self) -> dict[str, str]:
        """Each service's address, once `start` has chosen the ports."""
        return {name: service.spec.url for name, service in self._services.items()}

    @property
    def url(self) -> str:
        """The search service's address."""
        return self.urls["search"]

    async def start(self) -> None:
        """
        Start the services and return when all are ready; if that fails, or is cancelled, none is left running.

        Raises:
            StackError: A port or the data folder is taken, a service cannot start, or is not ready in time.
        """
        self._take_lock()
        try:
            specs = self._specs()
            self._services = {
                spec.name: Supervised(spec, self._hear, first_backoff_s=self._first_backoff_s) for spec in specs
            }
            await self._start_all()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop all services: SIGTERM, then SIGKILL for what has not ended within the grace. May be called again."""
        try:
            await asyncio.gather(*(service.stop(self._grace_s) for service in self._services.values()))
        finally:
            if self._lock is not None:
                (self.data_dir / STATE_FILE).unlink(missing_ok=True)
                self._lock.close()
                self._lock = None

    async def _start_all(self) -> None:
        try:
            async with asyncio.timeout(self._ready_timeout_s), asyncio.TaskGroup() as starts:
                for service in self._services.values():
                    starts.create_task(service.start())
        except TimeoutError:
            late = ", ".join(name for name, service in self._services.items() if not service.is_ready)
            message = f"not ready after {self._ready_timeout_s:g} s: {late}; see the logs in {self.data_dir / 'logs'}"
            raise StackError(message) from None
        except ExceptionGroup as failures:
            raise StackError("\n".join(str(failure) for failure in failures.exceptions)) from failures

    def _take_lock(self) -> None:
        try:
            (self.data_dir / "logs").mkdir(parents=True, exist_ok=True)
            lock = (self.data_dir / _LOCK_FILE).open("a+")
        except OSError as error:
            raise StackError(f"{self.data_dir} cannot be used as data folder: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise StackError(
                f"a stack is running on {self.data_dir} already (process {holder}); "
                "stop it, or choose another folder with --data-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _specs(self) -> list[ServiceSpec]:
        hosts = {name: self._environ.get(f"{name.upper()}_LISTEN_HOST") or LOOPBACK for name in SERVICES}
        hosts["search"] = self._host
        ports = _claim_ports(hosts, self._ports)
        urls = {name: f"http://{_reachable(hosts[name])}:{ports[name]}" for name in SERVICES}
        return [
            ServiceSpec(
                name=name,
                command=tuple(self._commands[name]),
                environ=self._service_environ(name, hosts[name], ports[name], urls),
                url=urls[name],
                log=self.data_dir / "logs" / f"{name}.log",
            )
            for name in SERVICES
        ]

    def _service_environ(self, name: str, host: str, port: int, urls: Mapping[str, str]) -> dict[str, str]:
        prefix = name.upper()
        filled_in = {f"{prefix}_LOG_FORMAT": "json"}
        if self._api_key:
            filled_in |= {f"{prefix}_API_KEY": self._api_key}
            if name == "search":
                filled_in["SEARCH_PEER_API_KEY"] = self._api_key
        environ = filled_in | dict(self._environ)
        environ |= {f"{prefix}_LISTEN_HOST": host, f"{prefix}_LISTEN_PORT": str(port)}
        if name == "search":
            environ |= {
                "SEARCH_EMBEDDING_URL": urls["embedding"],
                "SEARCH_RERANK_URL": urls["rerank"],
                "SEARCH_DATA_DIR": str(self.data_dir / "search"),
            }
        return environ

    def _hear(self, event: Event) -> None:
        if event.kind in ("starting", "ready"):
            self._write_state()
        self._on_event(event)

    def _write_state(self) -> None:
        services: dict[str, dict[str, Any]] = {
            name: {"pid": service.pid, "url": service.spec.url} for name, service in self._services.items()
        }
        state = {"pid": os.getpid(), "written_at": time.time(), "services": services}
        temporary = self.data_dir / f"{STATE_FILE}.tmp"
        temporary.write_text(json.dumps(state, indent=2) + "\n")
        temporary.replace(self.data_dir / STATE_FILE)


def service_command(name: str) -> tuple[str, ...]:
    """Return what runs service *name* with this Python; -P keeps a `services` folder of the user's out of its way."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        # A checkout, which need not be installed: its root holds nothing that could hide another module.
        start = f"import runpy, sys; sys.path.insert(0, {str(root)!r}); "
        return (sys.executable, "-P", "-c", f"{start}runpy.run_module('services.{name}', {{}}, '__main__', True)")
    return (sys.executable, "-P", "-m", f"services.{name}")


def _reachable(host: str) -> str:
    """Return the host part of a URL at which what listens on *host* is reached from this machine."""
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _claim_ports(hosts: Mapping[str, str], ports: Ports) -> dict[str, int]:
    """Return each service's port, free at this moment. Raises StackError for one that is not."""
    claimed: dict[str, int] = {}
    sockets = []
    try:
        for name in SERVICES:
            # Held until all are chosen, so that no two services get the same.
            bound = _bind(name, hosts[name], ports.of(name))
            sockets.append(bound)
            claimed[name] = bound.getsockname()[1]
    finally:
        for bound in sockets:
            bound.close()
    return claimed


def _bind(name: str, host: str, port: int) -> socket.socket:
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Two sockets with SO_REUSEADDR may be bound to one port for as long as neither listens.
        bound.listen(1)
    except OSError as error:
        if bound is not None:
            bound.close()
        reason = (
            "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror or error})"
        )
        raise StackError(
            f"port {port} of {host}, for the {name} service, {reason}; choose another with --{name}-port"
        ) from None
    return bound
