"""The first page: are searches answered, and which service, stage or dependency is at fault if not."""

from deploy.observability.grafana.panels import Dashboard, Panel, Query, Row
from deploy.observability.grafana.promql import OURS, SEARCHES, quantile, rate_of

OVERVIEW = Dashboard(
    "tercet-overview",
    "Tercet: overview",
    "Are searches answered, in time and in full; which service and which stage takes the time.",
    [
        Row(
            "Now",
            [
                Panel("Searches", [Query(SEARCHES, "searches")], "reqps", kind="stat", width=4, height=4),
                Panel(
                    "Failed",
                    [Query("slo:search_errors:ratio_rate5m", "failed")],
                    "percentunit",
                    "Searches with a 5xx answer, of the last 5 minutes.",
                    "stat",
                    4,
                    4,
                    bad_from=0.001,
                ),
                Panel(
                    "p99",
                    [Query(quantile(0.99, "search_latency_seconds", by=""), "p99")],
                    "s",
                    "Time to answer a search, cached answers included.",
                    "stat",
                    4,
                    4,
                    bad_from=0.5,
                ),
                Panel(
                    "Degraded",
                    [Query("tercet:search_degraded:ratio_rate5m", "degraded")],
                    "percentunit",
                    "Answers that the pipeline made without a part that should be there, or took from an older answer.",
                    "stat",
                    4,
                    4,
                    bad_from=0.05,
                ),
                Panel(
                    "Processes",
                    [Query(f"sum by (job) (up{{{OURS}}})", "{{job}}")],
                    kind="stat",
                    width=5,
                    height=4,
                    bad_below=1,
                ),
                Panel(
                    "Alerts",
                    [Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing")],
                    kind="stat",
                    width=3,
                    height=4,
                    bad_from=1,
                ),
            ],
        ),
        Row(
            "Error budget: 1 is what lasts exactly a month",
            [
                Panel(
                    "Availability: burn rate",
                    [
                        Query(f"slo:search_errors:ratio_rate{window} / 0.001", window)
                        for window in ("5m", "1h", "6h", "3d")
                    ],
                    about="99.9 % of the searches get no 5xx answer. At 14.4 for an hour somebody is called.",
                    width=12,
                    bad_from=14.4,
                ),
                Panel(
                    "Latency: burn rate",
                    [
                        Query(f"slo:search_slow:ratio_rate{window} / 0.01", window)
                        for window in ("5m", "1h", "6h", "3d")
                    ],
                    about="99 % of the searches are answered within 0.5 s.",
                    width=12,
                    bad_from=14.4,
                ),
            ],
        ),
        Row(
            "Services",
            [
                Panel("Requests", [Query("job:tercet_requests:rate5m", "{{job}}")], "reqps"),
                Panel(
                    "5xx answers",
                    [Query("job:tercet_request_errors:ratio_rate5m", "{{job}}")],
                    "percentunit",
                    bad_from=0.01,
                ),
                Panel("Requests under way", [Query("sum by (job) (tercet_http_requests_in_flight)", "{{job}}")]),
                Panel(
                    "Time to answer",
                    [
                        Query(quantile(0.5, "tercet_http_request_duration_seconds"), "{{job}} p50"),
                        Query(quantile(0.99, "tercet_http_request_duration_seconds"), "{{job}} p99"),
                    ],
                    "s",
                    "All routes, health and metrics too; the shards' calls are within the searches'.",
                ),
                Panel(
                    "Answers by status",
                    [Query(rate_of("tercet_http_requests_total", "job, status"), "{{job}} {{status}}")],
                    "reqps",
                ),
                Panel(
                    "Errors by code", [Query(rate_of("tercet_errors_total", "job, code"), "{{job}} {{code}}")], "reqps"
                ),
            ],
        ),
        Row(
            "Stages of a search",
            [
                Panel(
                    "p95 by stage",
                    [Query(quantile(0.95, "tercet_search_stage_seconds", "stage"), "{{stage}}")],
                    "s",
                    "Stages that a search skips are not counted for it.",
                    width=12,
                ),
                Panel(
                    "Where the time goes",
                    [Query(rate_of("tercet_search_stage_seconds_sum", "stage", 'stage!="total"'), "{{stage}}")],
                    "s",
                    "Seconds that searches spend in each stage, a second.",
                    width=12,
                    whole=True,
                ),
            ],
        ),
        Row(
            "Dependencies",
            [
                Panel(
                    "Breakers",
                    [Query("max by (job, dependency) (tercet_breaker_state)", "{{job}} → {{dependency}}")],
                    about="0 closed, 1 half-open, 2 open.",
                    bad_from=1,
                ),
                Panel(
                    "Calls that failed or were slow",
                    [Query(rate_of("tercet_dependency_failures_total", "job, dependency"), "{{job}} → {{dependency}}")],
                    "cps",
                ),
                Panel(
                    "Retries and hedged reads",
                    [Query(rate_of("tercet_extra_calls_total", "dependency, outcome"), "{{dependency}} {{outcome}}")],
                    "cps",
                    "`refused`: the budget for extra calls was used up.",
                ),
            ],
        ),
    ],
)
