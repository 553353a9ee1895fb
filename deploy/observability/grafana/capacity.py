"""The page about what is used, by whom, and what a search costs."""

from deploy.observability.grafana.panels import Dashboard, Panel, Query, Row
from deploy.observability.grafana.promql import OURS, SEARCHES, rate_of

_SEARCH = 'job="search"'
_MODELS = 'job=~"embedding|rerank"'
_KEY_TOKENS = rate_of("tercet_key_tokens_total", "job, key", _MODELS)
_KEY_REQUESTS = rate_of("tercet_key_requests_total", "job, key", _SEARCH)
_KEY_TOKEN_SHARE = f"{_KEY_TOKENS} / on (job) group_left {rate_of('tercet_key_tokens_total', only=_MODELS)}"
_KEY_REQUEST_SHARE = f"{_KEY_REQUESTS} / on (job) group_left {rate_of('tercet_key_requests_total', only=_SEARCH)}"


def _of_both(shape: str) -> list[Query]:
    """Return the query *shape* for embedding and for rerank, `WORK` in it being the one or the other."""
    return [Query(shape.replace("WORK", work), "{{job}}") for work in ("embedding", "rerank")]


CAPACITY = Dashboard(
    "tercet-capacity",
    "Tercet: capacity and cost",
    "What is used of processors, memory and disks, for which service and whose key, and what a search costs.",
    [
        Row(
            "Load",
            [
                Panel(
                    "Admission to search",
                    [
                        Query("sum by (job) (tercet_admission_limit)", "limit"),
                        Query("sum by (job) (tercet_admission_in_flight)", "under way"),
                        Query("sum by (job) (tercet_admission_waiting)", "waiting"),
                    ],
                    about="Work by its cost; the limit follows how long work takes.",
                ),
                Panel(
                    "Pressure",
                    [Query("max by (instance) (tercet_admission_pressure)", "{{instance}}")],
                    "percentunit",
                    "1: requests are turned away.",
                    bad_from=0.5,
                ),
                Panel(
                    "Turned away",
                    [
                        Query(rate_of("tercet_shed_total", "priority"), "search, priority {{priority}}"),
                        Query(rate_of("tercet_errors_total", "job", 'code="overloaded"'), "{{job}}: queue full"),
                        Query(
                            rate_of("tercet_errors_total", "job", 'code="rate_limited"'),
                            "{{job}}: over the caller's allowance",
                        ),
                    ],
                    "reqps",
                ),
            ],
        ),
        Row(
            "Processors and memory",
            [
                Panel(
                    "CPU",
                    [Query("job:tercet_cpu:rate5m", "{{job}}")],
                    "short",
                    "CPU seconds a second: cores in use.",
                    whole=True,
                ),
                Panel(
                    "GPU",
                    [Query("job:tercet_gpu:rate5m", "{{job}}")],
                    "short",
                    "Seconds a second that a model computed in processes that have a GPU.",
                    whole=True,
                ),
                Panel(
                    "Utilisation of the models",
                    _of_both(f"{rate_of('tercet_WORK_inference_seconds_sum')} / on (job) count by (job) (up == 1)"),
                    "percentunit",
                    "Share of the time that a model computes, mean of the processes.",
                    bad_from=0.9,
                ),
                Panel(
                    "Memory",
                    [Query(f"sum by (job) (process_resident_memory_bytes{{{OURS}}})", "{{job}}")],
                    "bytes",
                    whole=True,
                ),
                Panel(
                    "GPU memory",
                    [Query("gpu_memory_used_bytes / gpu_memory_total_bytes", "{{job}} {{instance}}")],
                    "percentunit",
                    bad_from=0.92,
                ),
                Panel(
                    "Open files",
                    [Query(f"max by (job) (process_open_fds{{{OURS}}} / process_max_fds{{{OURS}}})", "{{job}}")],
                    "percentunit",
                    "Share of what the process may open.",
                    bad_from=0.8,
                ),
            ],
        ),
        Row(
            "What it costs",
            [
                Panel(
                    "Searches for a core-hour",
                    [Query(f"{SEARCHES} / sum(job:tercet_cpu:rate5m) * 3600", "searches")],
                    "short",
                    "Searches, cached ones included, for an hour of one core; everything that all services do is counted.",
                    "stat",
                ),
                Panel(
                    "Tokens for a core-second",
                    _of_both(f"{rate_of('tercet_WORK_tokens_total')} / on (job) job:tercet_cpu:rate5m"),
                    "short",
                    "",
                    "stat",
                ),
                Panel(
                    "CPU seconds of a search, by service",
                    [Query(f"job:tercet_cpu:rate5m / on () group_left {SEARCHES}", "{{job}}")],
                    "s",
                    "What indexing costs is in it too.",
                    "bargauge",
                ),
                Panel(
                    "Tokens by key",
                    [Query(_KEY_TOKENS, "{{job}}: {{key}}")],
                    "cps",
                    "Model tokens. Search's own key stands for all who ask search.",
                    whole=True,
                ),
                Panel(
                    "Searches by key",
                    [Query(_KEY_REQUESTS, "{{key}}")],
                    "reqps",
                    "All requests to search: searches, writes, reading back.",
                    whole=True,
                ),
                Panel(
                    "CPU seconds by key",
                    [
                        Query(f"{_KEY_TOKEN_SHARE} * on (job) group_left job:tercet_cpu:rate5m", "{{job}}: {{key}}"),
                        Query(f"{_KEY_REQUEST_SHARE} * on (job) group_left job:tercet_cpu:rate5m", "{{job}}: {{key}}"),
                    ],
                    "s",
                    "Shares of the service's CPU seconds: by tokens where a model computes, by requests in search.",
                    whole=True,
                ),
                Panel(
                    "GPU seconds by key",
                    [Query(f"{_KEY_TOKEN_SHARE} * on (job) group_left job:tercet_gpu:rate5m", "{{job}}: {{key}}")],
                    "s",
                    "Shares of the service's GPU seconds, by tokens.",
                    whole=True,
                ),
            ],
        ),
    ],
)
