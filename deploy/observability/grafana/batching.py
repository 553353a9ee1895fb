"""The page about batches: both model services have the same batcher, so the same pictures."""

from deploy.observability.grafana.panels import Dashboard, Panel, Query, Row
from deploy.observability.grafana.promql import mean, quantile, rate_of, share_of


def _batching(work: str) -> list[Panel]:
    """Return what the batcher of *work* tells, in the same pictures for both model services."""
    metric = f"tercet_{work}"
    padding = rate_of(f"{metric}_padding_tokens_total")
    return [
        Panel(
            "Waiting",
            [
                Query(f"sum by (instance) ({metric}_{lane}_queue_items)", f"{lane} {{{{instance}}}}")
                for lane in ("query", "bulk")
            ],
        ),
        Panel(
            "Wait for the model",
            [Query(quantile(q, f"{metric}_queue_seconds", "lane"), f"{{{{lane}}}} p{q * 100:g}") for q in (0.5, 0.99)],
            "s",
            "From tokenised to the start of the batch.",
            bad_from=0.25,
        ),
        Panel(
            "A batch takes",
            [Query(quantile(q, f"{metric}_inference_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)],
            "s",
        ),
        Panel(
            "Items in a batch",
            [
                Query(mean(f"{metric}_batch_items"), "mean"),
                Query(quantile(0.95, f"{metric}_batch_items"), "p95"),
            ],
        ),
        Panel(
            "Tokens",
            [Query(rate_of(f"{metric}_tokens_total", "lane"), "{{lane}}")],
            "cps",
            "Tokens asked for, a second.",
            whole=True,
        ),
        Panel(
            "Padding",
            [
                Query(
                    f"{padding} / ({padding} + {rate_of(f'{metric}_tokens_total')})",
                    "share of what is computed",
                )
            ],
            "percentunit",
            "Tokens that are computed for nothing, as texts of a batch are of different lengths.",
        ),
        Panel(
            "Tokenising takes", [Query(quantile(0.95, f"{metric}_tokenization_seconds", "lane"), "{{lane}} p95")], "s"
        ),
        Panel(
            "Computed once for several", [Query(rate_of(f"{metric}_coalesced_items_total", "lane"), "{{lane}}")], "cps"
        ),
        Panel(
            "The model is busy",
            [Query(f"sum by (instance) (rate({metric}_inference_seconds_sum[$__rate_interval]))", "{{instance}}")],
            "percentunit",
            "Share of the time that a batch is computed. Near 1 more work waits longer, and another replica helps.",
            bad_from=0.9,
        ),
    ]


BATCHING = Dashboard(
    "tercet-batching",
    "Tercet: embedding and rerank batching",
    "What batches are made of, how long work waits for them, and what the caches spare.",
    [
        Row("Embedding", _batching("embedding")),
        Row(
            "Embedding: requests, cache, models",
            [
                Panel(
                    "Time to answer",
                    [Query(quantile(q, "embedding_latency_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)],
                    "s",
                    "All requests; large ones of texts to be indexed take longer by right.",
                    bad_from=0.5,
                ),
                Panel(
                    "Vector cache: hits",
                    [
                        Query(
                            share_of("tercet_embedding_cache_texts_total", 'result="hit"'),
                            "share of texts",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Tokens",
                    [
                        Query(quantile(0.95, "tercet_embedding_request_tokens"), "of a request, p95"),
                        Query(quantile(0.95, "tercet_embedding_batch_tokens"), "of a batch with padding, p95"),
                    ],
                ),
                Panel("Models in memory", [Query("sum by (instance) (tercet_embedding_models)", "{{instance}}")]),
                Panel(
                    "Their weights",
                    [Query("sum by (instance) (tercet_embedding_models_bytes)", "{{instance}}")],
                    "bytes",
                ),
                Panel(
                    "Loads and unloads, in an hour",
                    [
                        Query(
                            "sum by (result) (increase(tercet_embedding_model_loads_total[1h]))", "loaded: {{result}}"
                        ),
                        Query(
                            "sum by (reason) (increase(tercet_embedding_model_evictions_total[1h]))",
                            "unloaded: {{reason}}",
                        ),
                    ],
                ),
            ],
        ),
        Row("Rerank", _batching("rerank")),
        Row(
            "Rerank: cache",
            [
                Panel(
                    "Score cache: hits",
                    [
                        Query(
                            share_of("tercet_rerank_cache_documents_total", 'result="hit"'),
                            "share of documents",
                        )
                    ],
                    "percentunit",
                ),
            ],
        ),
    ],
)
