"""Updates, drains, lost machines and load leave enough pods that answer."""

from services.search.ledger.postgres.ledger import POOL_SIZE
from tests.deploy.manifests import COMPONENT, NAME, Overlay, each_workload, load, quantity, selects

SINGLE = {"fallback", "redis", "postgres"}
"""There is one of each: searches do without the first two, and the third is for a trial."""

PRIORITIES = {
    "postgres": "tercet-data",
    "shard": "tercet-data",
    "search": "tercet-serving",
    "embedding": "tercet-serving",
    "rerank": "tercet-serving",
    "fallback": "tercet-spare",
    "redis": "tercet-spare",
}


def test_one_thing_sets_the_replicas(overlay: Overlay):
    """A Deployment that is autoscaled has no `replicas`, which each apply would set back; everything else has them."""
    scaled = overlay.autoscaled()
    assert len(scaled) == len([*overlay.of("HorizontalPodAutoscaler"), *overlay.of("ScaledObject")])
    for workload in overlay.workloads:
        assert ("replicas" in workload.spec) is (workload.name not in scaled), workload.name
    assert {"embedding", "rerank", "search"} <= scaled.keys()


def test_autoscalers_have_targets(overlay: Overlay):
    """Each scales a Deployment that is there, by the CPU that its container requests; shards are never autoscaled."""
    for name, scaler in overlay.autoscaled().items():
        spec, workload = scaler["spec"], overlay.workload(name)
        assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert workload.kind == "Deployment"
        assert workload.container["resources"]["requests"]["cpu"]
        container = workload.container["name"]
        if scaler["kind"] == "HorizontalPodAutoscaler":
            (metric,) = spec["metrics"]
            assert metric["type"] == "ContainerResource"
            assert (metric["containerResource"]["container"], metric["containerResource"]["name"]) == (container, "cpu")
        for trigger in spec.get("triggers", []):
            if trigger["type"] == "cpu":
                assert trigger["metadata"]["containerName"] == container
        assert 1 <= max(overlay.replicas(workload), 1) <= overlay.replicas(workload, most=True)


def test_keda_goes_on_as_the_plain_autoscaler_does():
    """With KEDA the same Deployments scale between the same numbers, as quickly and as slowly, at the same CPU."""
    plain, keda = load("cpu").autoscaled(), load("ci").autoscaled()
    for name, scaler in plain.items():
        old, new = scaler["spec"], keda[name]["spec"]
        assert (old["minReplicas"], old["maxReplicas"]) == (new["minReplicaCount"], new["maxReplicaCount"])
        assert old["behavior"] == new["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        (cpu,) = [trigger for trigger in new["triggers"] if trigger["type"] == "cpu"]
        target = old["metrics"][0]["containerResource"]["target"]
        assert (cpu["metricType"], cpu["metadata"]["value"]) == (target["type"], str(target["averageUtilization"]))


def test_gpu_pools_scale_to_zero():
    """Without bulk work and outside working hours no GPU is held, and what starts one is seen while there is none."""
    overlay = load("ci")
    for name in ("embedding-gpu", "rerank-gpu"):
        spec = overlay.autoscaled()[name]["spec"]
        assert spec["minReplicaCount"] == 0
        by_type = {trigger["type"]: trigger["metadata"] for trigger in spec["triggers"]}
        assert by_type.keys() == {"prometheus", "cron"}  # By CPU nothing could leave zero.
        assert f'job="{name.removesuffix("-gpu")}"' in by_type["prometheus"]["query"]
        assert "-gpu" not in by_type["prometheus"]["query"]
        assert int(by_type["prometheus"]["activationThreshold"]) < int(by_type["prometheus"]["threshold"])
        assert int(by_type["cron"]["desiredReplicas"]) >= 1


def test_what_answers_is_there_twice():
    """In a cluster one pod of each kind may be lost; the laptop's overlay has one of each, and says so."""
    for name in ("cpu", "gpu", "ci"):
        overlay = load(name)
        for workload in overlay.workloads:
            if workload.labels[NAME] not in SINGLE and not workload.labels[COMPONENT].endswith("-gpu"):
                assert overlay.replicas(workload) >= 2, workload.name


def test_a_drain_ends(overlay: Overlay):
    """A budget is for one workload, lets at least one pod go whatever the number, and leaves one where there are two."""
    budgeted = set()
    for budget in overlay.of("PodDisruptionBudget"):
        spec = budget["spec"]
        (workload,) = [item for item in overlay.workloads if selects(spec["selector"], item.labels)]
        budgeted.add(workload.name)
        assert spec["maxUnavailable"] == 1
        assert "minAvailable" not in spec
        assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert overlay.replicas(workload) - 1 >= (0 if overlay.name == "laptop" else 1)
    kinds = {"embedding", "rerank", "search", "shard"}
    assert budgeted == {
        item.name for item in overlay.workloads if item.labels[NAME] in kinds and not item.name.endswith("-gpu")
    }


def test_updates_fit_the_kind(overlay: Overlay):
    """Stateless pods are replaced before they go, scarce GPUs after, and replicas of a shard node one at a time."""
    for workload in overlay.ours:
        spec = workload.spec
        assert spec["minReadySeconds"] > 0
        if workload.kind == "StatefulSet":
            assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}
            assert spec["podManagementPolicy"] == "Parallel"
            continue
        rolling = spec["strategy"]["rollingUpdate"]
        startup = workload.probes()["startupProbe"]
        assert spec["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]
        is_gpu = "affinity" in workload.pod
        assert (rolling["maxSurge"], rolling["maxUnavailable"]) == ((0, 1) if is_gpu else (1, 0))


def test_removed_pods_are_waited_for(overlay: Overlay):
    """A pod goes on answering until callers know that it goes: a look-up every 3 s, and 5 s that a resolver may keep one."""
    from services.common.addresses import RESOLVE_EVERY_S

    for workload in overlay.ours:
        found = overlay.find("Service", workload.spec.get("serviceName", workload.labels[NAME]))
        assert found is not None
        seconds = workload.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        headless = found["spec"].get("clusterIP") == "None"
        assert seconds >= (RESOLVE_EVERY_S + 5 if headless else 5)


def test_probes_have_patience(overlay: Overlay):
    """Readiness is quick to say no, liveness slower than readiness, and a start has minutes."""
    for workload in overlay.workloads:
        spans = {name: probe["periodSeconds"] * probe["failureThreshold"] for name, probe in workload.probes().items()}
        assert spans["readinessProbe"] < spans["livenessProbe"] <= spans["startupProbe"]
        assert all(probe["timeoutSeconds"] <= probe["periodSeconds"] for probe in workload.probes().values())
        if workload.module:
            assert spans["readinessProbe"] <= 5


def test_replicas_are_spread(overlay: Overlay):
    """Pods of a workload go to different machines and zones; two replicas of a shard never share a machine if they need not."""
    for workload in overlay.workloads:
        if workload.labels[NAME] in SINGLE:
            continue
        spread = {item["topologyKey"]: item for item in workload.pod["topologySpreadConstraints"]}
        assert spread.keys() == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        for item in spread.values():
            assert item["labelSelector"]["matchLabels"] == workload.spec["selector"]["matchLabels"]
            assert item["maxSkew"] == 1
            # Otherwise a control plane's machine would be the emptiest, and the second replica have no place.
            assert item["nodeTaintsPolicy"] == "Honor"
        strict = spread["kubernetes.io/hostname"]["whenUnsatisfiable"] == "DoNotSchedule"
        assert strict is (workload.labels[NAME] == "shard")


def test_priorities_keep_the_data_longest(overlay: Overlay):
    """What is evicted last is the data, then what answers, then what can be done without."""
    values = {item["metadata"]["name"]: item["value"] for item in overlay.of("PriorityClass")}
    assert values["tercet-data"] > values["tercet-serving"] > values["tercet-spare"] > 0
    assert max(values.values()) <= 1_000_000_000  # More is Kubernetes' own.
    for workload in overlay.workloads:
        name = workload.pod["priorityClassName"]
        assert name == ("tercet-spare" if "affinity" in workload.pod else PRIORITIES[workload.labels[NAME]])


def test_claims_are_kept_as_long_as_they_are_worth():
    """The ledger's disk outlives everything; a shard's goes when its replica is no longer wanted."""
    kept = {item.name: item.spec.get("persistentVolumeClaimRetentionPolicy") for item in load("cpu").workloads}
    assert kept["postgres"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    for name in ("shard-0", "shard-1", "fallback"):
        assert kept[name] == {"whenDeleted": "Retain", "whenScaled": "Delete"}
    assert kept["redis"] is None


def test_gpus_are_whole_and_asked_for_once():
    """A GPU pod requests the one GPU, or slice, that it may have, is let onto such a machine, and goes nowhere else."""
    for overlay, resource in ((load("gpu"), "nvidia.com/gpu"), (load("ci"), "nvidia.com/mig-1g.10gb")):
        pools = [item for item in overlay.workloads if item.name.endswith("-gpu")]
        assert len(pools) == 2
        for workload in pools:
            for kind in ("requests", "limits"):
                asked = workload.container["resources"][kind]
                assert {name: count for name, count in asked.items() if "nvidia" in name} == {resource: "1"}
            assert workload.pod["tolerations"] == [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ]
            assert "requiredDuringSchedulingIgnoredDuringExecution" in workload.pod["affinity"]["nodeAffinity"]
            mounts = {mount["mountPath"]: mount["name"] for mount in workload.container["volumeMounts"]}
            (memory,) = [item for item in workload.pod["volumes"] if item["name"] == mounts["/dev/shm"]]
            assert memory["emptyDir"]["medium"] == "Memory"


def test_the_trial_database_takes_all_connections():
    """While every autoscaler is at its most and each update has its pod more, the processes' connections fit."""
    overlay = load("cpu")
    args = overlay.workload("postgres").container["args"]
    (most,) = [int(arg.split("=")[1]) for arg in args if arg.startswith("max_connections=")]
    processes = 0
    for workload in overlay.ours:
        if "SEARCH_LEDGER_URL" in overlay.environment(workload):
            surge = workload.spec.get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", 0)
            processes += overlay.replicas(workload, most=True) + surge
    assert processes * (POOL_SIZE + 1) + 3 <= most  # One listens; three are the superuser's.


def test_the_trial_fits_a_laptop():
    """What the laptop's overlay requests, with one pod more for an update, is less than 4 CPUs and 8 GiB have to give."""
    overlay = load("laptop")
    cpus = memory = 0.0
    for workload in overlay.workloads:
        pods = overlay.replicas(workload) + workload.spec.get("strategy", {}).get("rollingUpdate", {}).get(
            "maxSurge", 0
        )
        requests = workload.container["resources"]["requests"]
        cpus += pods * quantity(requests["cpu"])
        memory += pods * quantity(requests["memory"])
    assert cpus <= 3.5
    assert memory <= 6 * 2**30


def test_every_workload_is_checked():
    """The overlays have the workloads that the rest of the project names."""
    names = {workload.name for overlay, workload in each_workload() if overlay.name == "cpu"}
    assert names == {"embedding", "rerank", "search", "shard-0", "shard-1", "fallback", "redis", "postgres"}
