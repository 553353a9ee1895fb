"""
What kubelet does for one pod: its process from the manifest, its probes, its restarts, and its end in good order.

Changed of what the manifest says: where it listens (0.0.0.0 means an address of the pod's own, on a loopback that all
share), and where its volumes are (directories of the simulation, also for /tmp). Everything else is taken as it is.
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.images import Images
from tests.cluster.isolation import end_with
from tests.cluster.timeline import Timeline
from tests.deploy.manifests import ROOT, Workload

# The pause before a container is started again: none the first time, then kubelet's.
_BACK_OFF_S = (0.0, 10.0, 20.0, 40.0)
_EVERYWHERE, _LOOPBACK = "0.0.0.0", "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where a pod is put: its node, its address, and the directories of its volumes by their names."""

    node: str
    address: str
    volumes: Mapping[str, Path]
    log: Path


@dataclass(frozen=True)
class Surroundings:
    """What all pods share; *changed* is called whenever one of them becomes ready, is no longer, or comes or goes."""

    images: Images
    timeline: Timeline
    session: aiohttp.ClientSession
    changed: Callable[[], None]


@dataclass
class Record:
    """What is known of a pod that had to end: its exit status, and whether it was forced to."""

    pod: str
    status: int
    forced: bool


@dataclass(eq=False)
class Pod:
    """One pod of *workload*, from *environ* and its manifest. `run` is its life; `delete` ends it."""

    name: str
    workload: Workload
    revision: int
    environ: Mapping[str, str]
    place: Place
    around: Surroundings
    ready: bool = False
    ready_since: float = 0.0
    restarts: int = 0
    end: Record | None = None
    allowed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    _told: asyncio.Event = field(default_factory=asyncio.Event)
    _process: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        self.allowed.set()

    @property
    def deleting(self) -> bool:
        """Whether it is on its way out."""
        return self._told.is_set()

    @property
    def available(self) -> bool:
        """Whether it has been ready for as long as its workload's minReadySeconds."""
        least_s = self.workload.spec.get("minReadySeconds", 0)
        return self.ready and not self.deleting and time.monotonic() - self.ready_since >= least_s

    @property
    def pid(self) -> int | None:
        """The number of its process while that runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> None:
        """Start its container, again whenever it ends, until the pod is deleted."""
        while not self._told.is_set():
            await self.allowed.wait()
            if self._told.is_set():
                return
            self._process = await self._spawn()
            probes = asyncio.create_task(self._probe(self._process))
            status = await self._process.wait()
            probes.cancel()
            _end_group(self._process.pid)
            self._is_ready(False)
            if self._told.is_set():
                return
            self.around.timeline.tell(f"{self.name}: its container ended with status {status} and is started again")
            await asyncio.sleep(_BACK_OFF_S[min(self.restarts, len(_BACK_OFF_S) - 1)])
            self.restarts += 1

    def kill(self) -> None:
        """End its process as a crash does."""
        if self.pid is not None:
            assert self._process is not None
            self._process.kill()

    async def end_now(self) -> None:
        """End its process, and wait until it is over."""
        self.kill()
        if self._process is not None:
            await self._process.wait()
            _end_group(self._process.pid)

    async def delete(self) -> None:
        """
        End the pod: endpoints lose it, preStop runs, then its container is told to stop, and made to when the grace is over.

        May be called more than once; returns when it is gone.
        """
        if self.deleting:
            await self.gone.wait()
            return
        self._told.set()
        self.allowed.set()
        self.around.changed()
        grace_ends = time.monotonic() + self.workload.pod["terminationGracePeriodSeconds"]
        await asyncio.sleep(self._pre_stop_s())
        await self._stop(grace_ends)
        silence(self.place.address, self.workload.ports.values())
        self.gone.set()
        self.around.changed()

    async def _stop(self, grace_ends: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            self.end = Record(self.name, process.returncode or 0 if process else 0, forced=False)
            return
        process.send_signal(self.around.images.stop_signal(self.workload.container["image"]))
        asked = time.monotonic()
        try:
            await asyncio.wait_for(process.wait(), max(0.0, grace_ends - asked))
        except TimeoutError:
            process.kill()
        status = await process.wait()
        took_s = time.monotonic() - asked
        self.end = Record(self.name, status, forced=status == -9)
        self.around.timeline.tell(f"{self.name}: ended with status {status}, {took_s:.1f} s after it was told to")

    def _pre_stop_s(self) -> float:
        hook = self.workload.container.get("lifecycle", {}).get("preStop", {})
        assert set(hook) <= {"sleep"}, f"{self.name}: only the preStop action `sleep` is known here"
        return float(hook.get("sleep", {}).get("seconds", 0))

    async def _spawn(self) -> asyncio.subprocess.Process:
        container, images = self.workload.container, self.around.images
        scratch = self._placed("/tmp")
        environ = {
            **images.environ,
            "HOME": scratch,
            "HOSTNAME": self.name,
            "POD_ADDRESS": self.place.address,
            "TMPDIR": scratch,
            **{name: self._placed(value) for name, value in self.environ.items()},
        }
        command = [self._placed(part) for part in [*container["command"], *container.get("args", [])]]
        with self.place.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command,
                env=environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=images.user(container["image"]),
                start_new_session=True,
                preexec_fn=partial(end_with, os.getpid()),
            )

    def _placed(self, value: str) -> str:
        """Return a value of the manifest with the pod's own address and directories in it."""
        if value == _EVERYWHERE:
            return self.place.address
        for mount in self.workload.container.get("volumeMounts", []):
            path = mount["mountPath"]
            if value == path or value.startswith(f"{path}/"):
                return str(self.place.volumes[mount["name"]]) + value[len(path) :]
        return value

    async def _probe(self, process: asyncio.subprocess.Process) -> None:
        """Ask until it has started, then whether it is ready and alive, for as long as the process runs."""
        probes = self.workload.probes()
        if not await self._passes(probes["startupProbe"]):
            self.around.timeline.tell(f"{self.name}: did not start in time and is killed")
            process.kill()
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_readiness(probes["readinessProbe"]))
            group.create_task(self._watch_liveness(probes["livenessProbe"], process))

    async def _passes(self, probe: Mapping[str, Any]) -> bool:
        """Whether the probe succeeds before it has failed as often as it may."""
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        for _ in range(probe.get("failureThreshold", 3)):
            if await self._ask(probe):
                return True
            await asyncio.sleep(probe.get("periodSeconds", 10))
        return False

    async def _watch_readiness(self, probe: Mapping[str, Any]) -> None:
        failures = 0
        while True:
            failures = 0 if await self._ask(probe) else failures + 1
            if failures == 0:
                self._is_ready(True)
            elif failures >= probe.get("failureThreshold", 3):
                self._is_ready(False)
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _watch_liveness(self, probe: Mapping[str, Any], process: asyncio.subprocess.Process) -> None:
        while await self._passes(probe):
            await asyncio.sleep(probe.get("periodSeconds", 10))
        if not self.deleting:
            self.around.timeline.tell(f"{self.name}: its liveness probe failed too often; it is killed")
            process.kill()

    async def _ask(self, probe: Mapping[str, Any]) -> bool:
        timeout_s = float(probe.get("timeoutSeconds", 1))
        if "exec" in probe:
            return await self._execute(probe["exec"]["command"], timeout_s)
        wanted = probe["httpGet"]
        port = self.workload.ports[wanted["port"]] if isinstance(wanted["port"], str) else wanted["port"]
        url = f"http://{self.place.address}:{port}{wanted['path']}"
        try:
            async with self.around.session.get(url, timeout=aiohttp.ClientTimeout(timeout_s)) as reply:
                return 200 <= reply.status < 400
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _execute(self, command: Iterable[str], timeout_s: float) -> bool:
        own = [part.replace(_LOOPBACK, self.place.address) for part in command]
        environ = {**self.around.images.environ, "POD_ADDRESS": self.place.address}
        quiet = subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*own, env=environ, stdin=quiet, stdout=quiet, stderr=quiet)
        try:
            return await asyncio.wait_for(process.wait(), timeout_s) == 0
        except TimeoutError:
            return False
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _is_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready, self.ready_since = ready, time.monotonic()
            self.around.changed()


def _end_group(pid: int) -> None:
    """End what a container's first process has left behind, as a container's own end does."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


_silent: list[socket.socket] = []


def silence(address: str, ports: Iterable[int]) -> None:
    """
    Have connections to the address of a pod that is gone answered by nobody, as on a network, until this process ends.

    A loopback would refuse them at once, which is kinder: here the queue of a listener that accepts nothing is kept full.
    """
    for port in ports:
        listener = socket.create_server((address, port), backlog=0)
        _silent.append(listener)
        for _ in range(2):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex((address, port))
            _silent.append(waiting)
