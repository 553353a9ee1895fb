"""
What the controllers of Deployments and StatefulSets do: as many pods as there should be, and new ones for old ones.

Each looks at what there is and takes the next step, over and over; so evictions and rolling updates need no code of their own.
"""

import asyncio
import math
from collections.abc import Callable, Sequence

from tests.cluster.pods import Pod
from tests.deploy.manifests import Workload

_LOOK_EVERY_S = 0.2


class Controller:
    """Keeps *desired* pods of *workload*: *create* makes one of a name and revision, *mine* returns those that are not gone."""

    def __init__(
        self,
        workload: Workload,
        desired: int,
        create: Callable[[str, int], None],
        mine: Callable[[], Sequence[Pod]],
    ) -> None:
        self.workload = workload
        self.desired = desired
        self.revision = 1
        self._create = create
        self._mine = mine
        self._endings: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take steps until cancelled."""
        while True:
            self.step()
            await asyncio.sleep(_LOOK_EVERY_S)

    def step(self) -> None:
        """Take the next steps that the state allows."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Whether there are exactly the pods that should be, all new and available."""
        mine = self._mine()
        return len(mine) == self.desired and all(pod.available and pod.revision == self.revision for pod in mine)

    def _delete(self, pod: Pod) -> None:
        ending = asyncio.create_task(pod.delete())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


class Deployment(Controller):
    """Rolls with at most maxSurge pods more and maxUnavailable less than desired."""

    _made = 0

    def step(self) -> None:
        """Add a pod where one is missing or may be added, and end an old one where enough are available."""
        rolling = self.workload.spec["strategy"]["rollingUpdate"]
        surge = _share(rolling["maxSurge"], self.desired, math.ceil)
        missing_at_most = _share(rolling["maxUnavailable"], self.desired, math.floor)
        alive = [pod for pod in self._mine() if not pod.deleting]
        old = [pod for pod in alive if pod.revision != self.revision]
        if len(alive) < self.desired + (surge if old else 0) and len(alive) - len(old) < self.desired:
            self._made += 1
            self._create(f"{self.workload.name}-{self.revision}-{self._made}", self.revision)
            return
        available = sum(pod.available for pod in alive)
        for pod in sorted(old, key=lambda pod: pod.available):
            if not pod.available or available > self.desired - missing_at_most:
                self._delete(pod)
                return


class StatefulSet(Controller):
    """Has pods of fixed names, which it makes at the same time, and rolls one after the other, the last one first."""

    def step(self) -> None:
        """Make pods that are missing; end the last old one if all are available."""
        there = {pod.name: pod for pod in self._mine()}
        names = [f"{self.workload.name}-{ordinal}" for ordinal in range(self.desired)]
        for name in names:
            if name not in there:
                self._create(name, self.revision)
                return
        if all(pod.available for pod in there.values()):
            for name in reversed(names):
                if there[name].revision != self.revision:
                    self._delete(there[name])
                    return


def _share(value: int | str, whole: int, rounded: Callable[[float], int]) -> int:
    """Return a number of pods that is given as such, or in per cent."""
    return rounded(whole * int(value.rstrip("%")) / 100) if isinstance(value, str) else value
