"""The page about shard nodes, the fallback index and the ledger."""

from deploy.observability.grafana.panels import Dashboard, Panel, Query, Row
from deploy.observability.grafana.promql import quantile, rate_of

LEDGER_FAILURES = rate_of("tercet_dependency_failures_total", only='dependency="ledger"')

SHARDS = Dashboard(
    "tercet-shards",
    "Tercet: shards",
    "Shard nodes, the fallback index and the ledger: who is behind, who does not answer, what they hold.",
    [
        Row(
            "Keeping up",
            [
                Panel(
                    "Behind the ledger",
                    [
                        Query(
                            "max by (job, instance, host) (tercet_shard_lag_operations)",
                            "{{job}} {{instance}} {{host}}",
                        )
                    ],
                    about="Operations that the shard furthest behind lacks.",
                ),
                Panel(
                    "Shards catching up",
                    [Query("sum by (job, instance) (tercet_shards_catching_up)", "{{job}} {{instance}}")],
                    bad_from=1,
                ),
                Panel(
                    "Age of the oldest snapshot",
                    [Query("max by (job, instance) (tercet_shard_snapshot_age_seconds)", "{{job}} {{instance}}")],
                    "s",
                    "Of changed shards; one is due every 5 minutes.",
                    bad_from=3600,
                ),
                Panel(
                    "Failed uses of the ledger",
                    [
                        Query(
                            f"{LEDGER_FAILURES} or 0 * sum by (job) (up{{job='search'}})",
                            "{{job}}",
                        )
                    ],
                    "cps",
                    "Of a PostgreSQL ledger; there is no breaker before a SQLite one.",
                    bad_from=0.02,
                ),
                Panel(
                    "Failed writes",
                    [Query("tercet:search_writes_failed:ratio_rate5m", "5xx answers")],
                    "percentunit",
                    bad_from=0.01,
                ),
                Panel("Nodes", [Query('sum by (job) (up{job=~"shard|fallback"})', "{{job}}")], bad_below=1),
            ],
        ),
        Row(
            "Answering",
            [
                Panel(
                    "Retrieval takes",
                    [
                        Query(quantile(q, "tercet_search_stage_seconds", "", 'stage="retrieve"'), f"p{q * 100:g}")
                        for q in (0.5, 0.95, 0.99)
                    ],
                    "s",
                ),
                Panel(
                    "A node answers in",
                    [
                        Query(
                            quantile(
                                0.95,
                                "tercet_http_request_duration_seconds",
                                "instance, route",
                                'job=~"shard|fallback",route!~"/livez|/readyz|/metrics"',
                            ),
                            "{{instance}} {{route}}",
                        )
                    ],
                    "s",
                    "p95.",
                ),
                Panel(
                    "Calls without an answer",
                    [
                        Query(
                            "sum by (host) (rate(tercet_shard_call_failures_total[$__rate_interval])) or vector(0)",
                            "{{host}}",
                        )
                    ],
                    "cps",
                    bad_from=0.1,
                ),
                Panel(
                    "The fallback index stood in",
                    [Query(rate_of("tercet_shard_fallback_answers_total"), "shards a second")],
                    "cps",
                    bad_from=0.001,
                ),
                Panel(
                    "Hedged reads",
                    [Query(rate_of("tercet_shard_hedged_reads_total", "winner"), "{{winner}} was first")],
                    "cps",
                ),
                Panel(
                    "Shards missing from answers",
                    [Query(rate_of("tercet_search_shards_missing_total"), "shards a second")],
                    "cps",
                    bad_from=0.001,
                ),
            ],
        ),
        Row(
            "Holding",
            [
                Panel("Open shards", [Query("sum by (job, instance) (tercet_shards_open)", "{{job}} {{instance}}")]),
                Panel(
                    "Rows by kind of segment",
                    [Query("sum by (job, kind) (tercet_shard_segment_rows)", "{{job}} {{kind}}")],
                    whole=True,
                ),
                Panel(
                    "Memory of indexes",
                    [Query("sum by (job, instance) (tercet_shard_memory_bytes)", "{{job}} {{instance}}")],
                    "bytes",
                ),
                Panel(
                    "Maintenance",
                    [Query(rate_of("tercet_shard_maintenance_seconds_sum", "job, instance"), "{{job}} {{instance}}")],
                    "percentunit",
                    "Share of the time that a host maintains its indexes; its threads rest in between.",
                ),
                Panel(
                    "Disk free",
                    [Query("tercet:disk_free:ratio", "{{job}} {{instance}} {{persistentvolumeclaim}}")],
                    "percentunit",
                    bad_below=0.15,
                ),
                Panel(
                    "Disk free, bytes",
                    [Query("min by (job, instance) (tercet_shard_disk_free_bytes)", "{{job}} {{instance}}")],
                    "bytes",
                ),
            ],
        ),
    ],
)
