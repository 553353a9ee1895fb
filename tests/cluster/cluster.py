"""All pods of an overlay: where they are put, who finds them, and who may be evicted when a node is drained."""

import asyncio
import itertools
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.controllers import Controller, Deployment, StatefulSet
from tests.cluster.images import Images
from tests.cluster.names import Names
from tests.cluster.pods import Place, Pod, Record, Surroundings
from tests.cluster.proxy import Proxy
from tests.cluster.timeline import Timeline
from tests.deploy.manifests import Overlay, selects

_EVICT_AGAIN_S = 5.0  # As kubectl drain does.


@dataclass
class Node:
    """A machine; its pods have addresses in 127.<number>.0.0/16. Each is a zone of its own."""

    name: str
    number: int
    cordoned: bool = False


@dataclass(frozen=True)
class Delays:
    """How long others take to see a change of the endpoints, and for how long DNS answers are kept after that, in seconds."""

    endpoints_s: float
    names_s: float


class Cluster:
    """
    The pods of *overlay* on *node_count* nodes, with *replicas* in place of the manifests' where they are given.

    Its tasks run in *group*, which ends with the first that fails. Close it with `aclose`.
    """

    def __init__(
        self,
        overlay: Overlay,
        place: Path,
        timeline: Timeline,
        delays: Delays,
        group: asyncio.TaskGroup,
        *,
        node_count: int = 3,
        replicas: Mapping[str, int] | None = None,
    ) -> None:
        self.overlay = overlay
        self.nodes = [Node(f"node-{number}", number) for number in range(1, node_count + 1)]
        self.pods: list[Pod] = []
        self.ended: list[Record] = []
        self._place = place
        self._timeline = timeline
        self._delays = delays
        self._group = group
        self._images = Images(place)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        self._around = Surroundings(self._images, timeline, self._session, self._changed)
        self._numbers = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._services = {item["metadata"]["name"]: item["spec"] for item in overlay.of("Service")}
        self._seen: dict[str, list[Pod]] = {name: [] for name in self._services}
        kinds = {"Deployment": Deployment, "StatefulSet": StatefulSet}
        self.controllers = {
            workload.name: self._controller(kinds, workload, replicas or {}) for workload in overlay.workloads
        }
        # Where there is one pod its own address is as good, and no proxy here slows it down.
        self._virtual = {
            name: f"127.96.0.{number}"
            for number, (name, spec) in enumerate(self._services.items(), 1)
            if spec.get("clusterIP") != "None" and self._pods_behind(spec) > 1
        }
        self._proxies: list[Proxy] = []

    def _controller(
        self, kinds: Mapping[str, type[Controller]], workload: Any, replicas: Mapping[str, int]
    ) -> Controller:
        return kinds[workload.kind](
            workload,
            replicas.get(workload.name, self.overlay.replicas(workload)),
            lambda name, revision: self._create(workload, name, revision),
            lambda: self.of(workload.name),
        )

    async def open(self) -> None:
        """Serve names and virtual addresses, and have the controllers make the pods."""
        await Names(self.lookup, self._delays.names_s).open()
        for name, address in self._virtual.items():
            for port in self._services[name]["ports"]:
                target = self._target_port(name, port["targetPort"])
                self._proxies.append(Proxy(address, port["port"], target, partial(self._addresses, name)))
                await self._proxies[-1].open()
        for controller in self.controllers.values():
            self._keep(controller.run())

    async def aclose(self) -> None:
        """Kill everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(proxy.aclose() for proxy in self._proxies), *(pod.end_now() for pod in self.pods))
        await self._session.close()

    def of(self, workload: str) -> list[Pod]:
        """Return the pods of a workload that are not gone yet."""
        return [pod for pod in self.pods if pod.workload.name == workload]

    def lookup(self, name: str) -> Sequence[str] | None:
        """Return what a name stands for, as others know it by now: of a Service, or of a ready pod of a headless one."""
        if name in self._virtual:
            return [self._virtual[name]]
        if name in self._seen:
            return self._addresses(name) or None
        pod, _, service = name.partition(".")
        found = [other.place.address for other in self._seen.get(service, []) if other.name == pod]
        return found or None

    async def roll(self, workload: str) -> None:
        """Make all of a workload's pods anew by its update strategy, and return when that is done."""
        self.controllers[workload].revision += 1
        await self.until_settled(workload)

    async def until_settled(self, *workloads: str) -> None:
        """Wait until these workloads, or all, have the pods that they should have, available."""
        while not all(self.controllers[name].settled() for name in workloads or self.controllers):
            await asyncio.sleep(0.1)

    async def drain(self, node: Node) -> None:
        """Let no more pods come to *node*, and evict those that are there, as their disruption budgets allow."""
        node.cordoned = True
        await asyncio.gather(*(self._evict(pod) for pod in self.pods if pod.place.node == node.name))

    async def _evict(self, pod: Pod) -> None:
        while not pod.deleting:
            if self._may_go(pod):
                self._timeline.tell(f"{pod.name}: evicted from {pod.place.node}")
                break
            self._timeline.tell(f"{pod.name}: its eviction would break a disruption budget and is tried again")
            await asyncio.sleep(_EVICT_AGAIN_S)
        await pod.delete()

    def _may_go(self, pod: Pod) -> bool:
        for budget in self.overlay.of("PodDisruptionBudget"):
            spec = budget["spec"]
            if pod.ready and selects(spec["selector"], pod.workload.labels):
                alike = [name for name, c in self.controllers.items() if selects(spec["selector"], c.workload.labels)]
                expected = sum(self.controllers[name].desired for name in alike)
                healthy = sum(other.ready and not other.deleting for name in alike for other in self.of(name))
                least = spec["minAvailable"] if "minAvailable" in spec else expected - spec["maxUnavailable"]
                if healthy - 1 < least:
                    return False
        return True

    def _create(self, workload: Any, name: str, revision: int) -> None:
        node = self._node_for(workload, revision)
        if node is None:
            return
        number = next(self._numbers)
        address = f"127.{node.number}.{number // 250}.{number % 250 + 1}"
        volumes = {
            volume["name"]: self._place / "pods" / f"{name}-{number}" / volume["name"]
            for volume in workload.pod["volumes"]
        }
        claims = workload.spec.get("volumeClaimTemplates", [])
        volumes |= {c["metadata"]["name"]: self._place / "claims" / f"{c['metadata']['name']}-{name}" for c in claims}
        for directory in volumes.values():
            directory.mkdir(parents=True, exist_ok=True)
            self._images.own(directory, workload.container["image"])
        log = self._place / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        where = Place(node.name, address, volumes, log)
        pod = Pod(name, workload, revision, self.overlay.environment(workload), where, self._around)
        self.pods.append(pod)
        self._timeline.tell(f"{name}: starts on {node.name} at {address}")
        self._keep(self._live(pod))

    async def _live(self, pod: Pod) -> None:
        running = asyncio.create_task(pod.run())
        try:
            await pod.gone.wait()
        finally:
            running.cancel()
        self.pods.remove(pod)
        if pod.end is not None:
            self.ended.append(pod.end)

    def _node_for(self, workload: Any, revision: int) -> Node | None:
        """Return the node with the fewest pods alike, as spread constraints want it; None where they forbid even that."""
        open_nodes = [node for node in self.nodes if not node.cordoned]
        if not open_nodes:
            return None
        constraints = workload.pod.get("topologySpreadConstraints", [])
        by_revision = any("pod-template-hash" in found.get("matchLabelKeys", ()) for found in constraints)
        alike = [
            pod.place.node
            for pod in self.of(workload.name)
            if not pod.deleting and (pod.revision == revision or not by_revision)
        ]
        busy = [pod.place.node for pod in self.pods if not pod.deleting]
        best = min(open_nodes, key=lambda node: (alike.count(node.name), busy.count(node.name), node.number))
        skew = alike.count(best.name) + 1 - min(alike.count(node.name) for node in open_nodes)
        strict = [found["maxSkew"] for found in constraints if found["whenUnsatisfiable"] == "DoNotSchedule"]
        return None if any(skew > most for most in strict) else best

    def _changed(self) -> None:
        ready = {
            name: [pod for pod in self.pods if pod.ready and not pod.deleting and self._selected(spec, pod)]
            for name, spec in self._services.items()
        }
        asyncio.get_running_loop().call_later(self._delays.endpoints_s, self._seen.update, ready)

    @staticmethod
    def _selected(service: Mapping[str, Any], pod: Pod) -> bool:
        return selects({"matchLabels": service["selector"]}, pod.workload.labels)

    def _addresses(self, service: str) -> list[str]:
        return [pod.place.address for pod in self._seen[service]]

    def _pods_behind(self, service: Mapping[str, Any]) -> int:
        """Return how many pods a Service should have."""
        selector = {"matchLabels": service["selector"]}
        return sum(c.desired for c in self.controllers.values() if selects(selector, c.workload.labels))

    def _target_port(self, service: str, target: str | int) -> int:
        if isinstance(target, int):
            return target
        selector = {"matchLabels": self._services[service]["selector"]}
        return next(w.ports[target] for w in self.overlay.workloads if selects(selector, w.labels))

    def _keep(self, life: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(self._group.create_task(life))

    def by_node(self) -> Iterator[tuple[Node, list[str]]]:
        """Yield each node with the names of its pods."""
        for node in self.nodes:
            yield node, sorted(pod.name for pod in self.pods if pod.place.node == node.name)
