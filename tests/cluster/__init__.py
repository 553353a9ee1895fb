"""
The processes of the rendered manifests on one machine, under load, while they are rolled, killed and drained.

`python -m tests.cluster` (`make cluster-sim`) starts every pod of an overlay from its own command, environment, volumes and
probes, plays kubelet, controllers, endpoints and kube-proxy over them as far as searches can notice, and counts failures.

    isolation   a network of its own, where every name is asked of names
    images      what stands in for container images
    pods        kubelet: one pod, its probes and its end
    controllers Deployments and StatefulSets
    cluster     all of it together: scheduling, endpoints, evictions
    names       the cluster's DNS;  proxy   what kube-proxy does
    load        searches at a steady rate;  acts    what is done meanwhile, and what replies may say then
    watch       a real Prometheus that finds the pods as it does on Kubernetes
"""
