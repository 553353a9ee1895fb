"""The page about what answers are worth."""

from deploy.observability.grafana.panels import Dashboard, Panel, Query, Row
from deploy.observability.grafana.promql import quantile, rate_of, share_of

RECALL = "tercet_retrieval_recall_at_10"
AT_MOST_7 = 'le="0.7"'

QUALITY = Dashboard(
    "tercet-quality",
    "Tercet: search quality",
    "What answers are worth: recall on live searches, steps down, what reranking changes, and what the result cache gives again.",
    [
        Row(
            "Recall",
            [
                Panel(
                    "Recall at 10",
                    [
                        Query("tercet:retrieval_recall:mean1h", "mean of the last hour"),
                        Query("retrieval_recall_at_10", "{{instance}}: last 200 samples"),
                    ],
                    "percentunit",
                    "Of the true ten nearest, how many were among the candidates, on a sample of live searches.",
                    bad_below=0.8,
                ),
                Panel(
                    "Samples under 0.8",
                    [
                        Query(
                            f"{rate_of(f'{RECALL}_bucket', only=AT_MOST_7)} / {rate_of(f'{RECALL}_count')}",
                            "found 7 or fewer of 10",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Samples",
                    [Query(rate_of("tercet_retrieval_recall_samples_total", "outcome"), "{{outcome}}")],
                    "cps",
                    "`moved`: the collection changed between the two searches; `skipped`: there was too much to do.",
                ),
            ],
        ),
        Row(
            "Answers",
            [
                Panel(
                    "By outcome",
                    [Query(rate_of("tercet_search_answers_total", "outcome"), "{{outcome}}")],
                    "reqps",
                    "Answers that the pipeline made; cached ones are below.",
                    whole=True,
                ),
                Panel("Steps down", [Query(rate_of("tercet_search_degraded_total", "reason"), "{{reason}}")], "cps"),
                Panel(
                    "Missing",
                    [
                        Query(rate_of("tercet_search_shards_missing_total"), "shards missing from answers"),
                        Query(rate_of("tercet_shard_lexical_failures_total"), "answers of vectors alone"),
                    ],
                    "cps",
                    bad_from=0.001,
                ),
            ],
        ),
        Row(
            "Reranking",
            [
                Panel(
                    "Agreement",
                    [Query("tercet_rerank_agreement", "{{instance}}")],
                    "percentunit",
                    "Share of the first ten before reranking that are among the first ten after it. 1: reranking does nothing.",
                ),
                Panel(
                    "Documents by who had the last word",
                    [Query(rate_of("tercet_rerank_documents_total", "outcome"), "{{outcome}}")],
                    "cps",
                    "`unscored`: there was no time for them.",
                    whole=True,
                ),
                Panel(
                    "Time of the stage",
                    [
                        Query(quantile(q, "tercet_search_stage_seconds", "", 'stage="rerank"'), f"p{q * 100:g}")
                        for q in (0.5, 0.95, 0.99)
                    ],
                    "s",
                ),
            ],
        ),
        Row(
            "Result cache",
            [
                Panel(
                    "Look-ups",
                    [Query(rate_of("tercet_result_cache_lookups_total", "outcome"), "{{outcome}}")],
                    "cps",
                    "`memory` and `redis` are hits.",
                    whole=True,
                ),
                Panel(
                    "Hits",
                    [
                        Query(
                            share_of("tercet_result_cache_lookups_total", 'outcome=~"memory|redis"'),
                            "share of look-ups",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Age of what is given again",
                    [Query(quantile(q, "tercet_result_cache_age_seconds", ""), f"p{q * 100:g}") for q in (0.5, 0.95)],
                    "s",
                ),
                Panel(
                    "Shared while made",
                    [Query(rate_of("tercet_result_cache_joined_total", "where"), "{{where}}")],
                    "cps",
                ),
                Panel("In memory", [Query("sum by (instance) (tercet_result_cache_bytes)", "{{instance}}")], "bytes"),
                Panel(
                    "Entries, evictions, older answers",
                    [
                        Query("sum by (job) (tercet_result_cache_entries)", "entries"),
                        Query(rate_of("tercet_result_cache_evictions_total"), "evicted a second"),
                        Query(rate_of("tercet_result_cache_stale_total"), "older answers a second"),
                    ],
                ),
            ],
        ),
    ],
)
