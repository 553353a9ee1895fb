"""What a search and its reply look like, for the documentation: every field is there."""

from typing import Any, Final

SEARCH_REQUEST: Final[dict[str, Any]] = {
    "query": "why are there two tides a day",
    "collection": "facts",
    "k": 1,
    "filter": {"year": {"$gte": 2020}},
    "include": ["text", "metadata", "highlights", "vector"],
    "facets": {"lang": 2},
    "explain": True,
    "timeout_ms": 250,
    "require": {"all_shards": False, "fresh": True},
}
_HIT: Final[dict[str, Any]] = {
    "id": "tides-1",
    "score": 1.482113,
    "score_kind": "blended",
    "title": "Tides",
    "text": "The Moon pulls the sea on both sides of the Earth, so that there are two tides a day.",
    "metadata": {"year": 2021, "lang": "en", "tags": ["sea", "moon"]},
    "vector": [0.6, 0.8],
    "highlights": [{"text": "so that there are two tides a day", "marks": [[18, 21], [22, 27]]}],
    "stages": {"dense": 0.713204, "bm25": 11.20417, "fused": 1.903311, "rerank": 0.96412},
}
_EXPLANATION: Final[dict[str, Any]] = {
    "shards": [
        {
            "shard": 0,
            "plan": {"vectors": "hnsw", "filter": {"estimated": 0.4, "true": 0.38}},
            "host": "http://shard-0:8010",
            "took_ms": 2.115,
            "applied_seq": 1041,
            "attempts": 2,
            "hedged": True,
        }
    ],
    "candidates": {"total": 143, "dense": 143, "bm25": 100, "reranked": 30, "below_min_score": 0},
    "fusion": {"method": "standardized", "dense": 0.65, "bm25": 0.2401, "bm25_confidence": 0.686},
    "cache": {"decision": "moved", "as_of": 1038, "age_ms": 5210, "watermark": 1041},
    "budget": {
        "timeout_ms": 249.1,
        "stages_ms": {"embed": 41.2, "retrieve": 121.4, "rerank": 229.8},
        "rerank_candidates": 54,
    },
    "admission": {"in_flight": 7.6, "limit": 32.0, "waited_ms": 0.0, "pressure": 0.0},
    "breakers": {"embedding": "closed", "rerank": "closed", "redis": "open"},
}
SEARCH_REPLY: Final[dict[str, Any]] = {
    "collection": "facts",
    "hits": [_HIT],
    "coverage": {
        "ratio": 0.5,
        "shards": {
            "total": 2,
            "ok": 1,
            "fallback": 0,
            "timed_out": 0,
            "failed": 1,
            "breaker_open": 1,
            "catching_up": 0,
        },
        "failures": [{"shard": 1, "reason": "the breakers of all its hosts are open"}],
    },
    "degraded": ["shards_partial", "cache_unavailable"],
    "pipeline": {"retrieval": "hybrid", "rerank": "all-MiniLM-L6-v2 late interaction"},
    "cache": {"hit": False, "age_ms": 0, "stale": False},
    "as_of": 1041,
    "timings_ms": {"embed": 3.1, "retrieve": 2.6, "fuse": 0.2, "rerank": 91.4, "hits": 0.9, "total": 98.7},
    "facets": {"lang": {"en": 31, "de": 4}},
    "explain": _EXPLANATION,
    "request_id": "0b6f5c1e",
}
