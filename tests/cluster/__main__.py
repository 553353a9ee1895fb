"""`make cluster-sim`: the processes of a rendered overlay under load, rolled, killed and drained. Exit status 1: a complaint."""

import argparse
import asyncio
import signal
import sys
import tempfile
from pathlib import Path

from tests.cluster import images, isolation
from tests.cluster.acts import Play, judge
from tests.cluster.cluster import Cluster, Delays
from tests.cluster.load import Load
from tests.cluster.timeline import Timeline
from tests.cluster.watch import watch
from tests.deploy.manifests import load as load_overlay

_INSIDE = "--inside"
_DOCUMENTS, _DOCUMENTS_SHORT = 600, 150
# What the short form does not hurt needs no second pod, and what it does not use none.
_SHORT_REPLICAS = {"embedding": 1, "rerank": 0, "fallback": 0, "shard-1": 1}
_SHORT_RATE = 10.0
_UNPROVED = """Not part of this, and so not proved by it:
  - the scheduler with real resources; priorities, preemption, autoscaling (HPA), node failure without a drain
  - NetworkPolicies, Pod Security, users, read-only root, capabilities: all run as one user on one file system
  - images and their entrypoints: PostgreSQL's is stood in for; limits of CPU and memory are not enforced
  - volumes: claims are directories that follow their pod to any node; nothing is detached and attached
  - kube-proxy itself: a user-space proxy takes each connection to a random ready pod
  - CoreDNS itself, the API server, leader elections: endpoints change a fixed time after the fact
  - the Ingress or Gateway before the front Service, and its own ideas of retries and kept-alive connections
  - two nodes or zones lost at once; PostgreSQL and Redis with more than one pod"""


def main() -> int:
    """Run it and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overlay", default="cpu", help="which of deploy/k8s/rendered")
    parser.add_argument("--short", action="store_true", help="one Deployment rolled and a replica killed, fewer pods")
    parser.add_argument("--prometheus", action="store_true", help="also: a real Prometheus, and embedding killed")
    parser.add_argument(
        "--busy", action="store_true", help="others use this machine: parts may be late, which is flagged"
    )
    parser.add_argument(
        "--rate", type=float, default=30.0, help=f"searches a second; {_SHORT_RATE:g} in the short form"
    )
    parser.add_argument("--reranked", type=float, default=0.1, help="which share of them; none in the short form")
    parser.add_argument("--endpoints-lag-s", type=float, default=2.0, help="how late a change of endpoints is seen")
    parser.add_argument("--names-kept-s", type=float, default=5.0, help="how long DNS answers are kept after that")
    parser.add_argument("--logs", type=Path, help="where the pods' logs are kept")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.rate, options.reranked = _SHORT_RATE, 0.0
    if not options.inside:
        why = images.trouble() or isolation.trouble()
        if why:
            sys.exit(f"the processes cannot be started here: {why}")
        return isolation.run_isolated("tests.cluster", [*sys.argv[1:], _INSIDE])
    with tempfile.TemporaryDirectory(prefix="cluster-") as name:
        place = Path(name)
        place.chmod(0o755)  # Also PostgreSQL's user has to reach its directory.
        isolation.settle_in(place)
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            (place / "logs").symlink_to(options.logs.resolve())
        return asyncio.run(_run(options, place))


async def _run(options: argparse.Namespace, place: Path) -> int:
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    timeline = Timeline()
    overlay = load_overlay(options.overlay)
    document_count = _DOCUMENTS_SHORT if options.short else _DOCUMENTS
    load = Load(options.rate, document_count, reranked=options.reranked)
    async with asyncio.TaskGroup() as group:
        delays = Delays(options.endpoints_lag_s, options.names_kept_s)
        replicas = _SHORT_REPLICAS if options.short else {}
        cluster = Cluster(overlay, place, timeline, delays, group, replicas=replicas)
        try:
            await cluster.open()
            await cluster.until_settled()
            timeline.tell("all pods are available")
            # So long some of them may still hold that others have no address.
            await asyncio.sleep(options.endpoints_lag_s + options.names_kept_s)
            timeline.tell(f"{await load.write_documents()} documents are written and applied")
            play = Play(cluster, load, timeline, busy=options.busy)
            alerts = await _act(play, load, cluster, options, place)
        finally:
            await cluster.aclose()
    found = judge(play, load, cluster)
    complaints = [*found.complaints, *alerts]
    print(
        f"\n{found.searches} searches, {found.failed} failed; {len(cluster.ended)} pods ended in good order"
        f" unless a line below says otherwise; {len(complaints)} complaints"
    )
    for complaint in complaints:
        print(f"  WRONG: {complaint}")
    print(_UNPROVED)
    return 1 if complaints else 0


async def _act(play: Play, load: Load, cluster: Cluster, options: argparse.Namespace, place: Path) -> list[str]:
    """Do everything under load, and return what Prometheus gave reason to complain about."""
    async with load.running():
        doing = play.short if options.short else play.whole
        if not options.prometheus:
            await doing()
            return []
        return await watch(cluster, play, place, doing)


if __name__ == "__main__":
    raise SystemExit(main())
