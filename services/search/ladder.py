"""
The ladder: what a search does when a part fails it. One row a step; docs/resilience.md has the same table.

Each step has a reason, which the reply lists in `degraded`, and a requirement by which a caller forbids it.
"""

from dataclasses import dataclass
from typing import Final

from services.common.errors import DeadlineExceeded, DependencyUnavailable, TercetError
from services.common.wire.search import Degradation, Require, Requirement

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step down: *part* failed so that *instead* was done; *late* where it was for want of time."""

    reason: Degradation
    part: str
    fault: str
    instead: str
    requirement: Requirement
    late: bool = False


LADDER: Final[tuple[Step, ...]] = (
    Step("embedding_unavailable", "embedding", "down, failing, or its breaker is open", "BM25 alone", "dense"),
    Step("embedding_late", "embedding", "no vector in its share of the time", "BM25 alone", "dense", late=True),
    Step("lexical_unavailable", "BM25", "the words of a shard cannot be searched", "vectors alone there", "lexical"),
    Step("fallback_index", "shard", "no replica answers", "the fallback index in its place", "primary"),
    Step("shards_partial", "shard", "nobody answers for it", "the other shards; `coverage` says which", "all_shards"),
    Step("catching_up", "shard", "behind the ledger", "what it has so far", "caught_up"),
    Step("rerank_unavailable", "rerank", "down, failing, or its breaker is open", "the fused order", "rerank"),
    Step("rerank_late", "rerank", "no score in the time left", "the fused order", "rerank", late=True),
    Step(
        "rerank_partial",
        "rerank",
        "time for some candidates only",
        "those first, the rest in fused order",
        "rerank",
        late=True,
    ),
    Step("rerank_reduced", "search", "under pressure", "fewer candidates are reranked", "rerank"),
    Step("cache_unavailable", "Redis", "out of reach", "no shared result cache", "cache"),
    Step(
        "stale", "everything", "nothing can be searched", "the last good answer, up to `stale_if_error_s` old", "fresh"
    ),
)
STEPS: Final[dict[Degradation, Step]] = {step.reason: step for step in LADDER}


def forbidden(require: Require, reason: Degradation) -> TercetError | None:
    """Return the error for a caller that forbids the step *reason*; None where it does not."""
    step = STEPS[reason]
    named = getattr(require, step.requirement)
    if not named and not (require.full and step.requirement != "cache"):
        return None
    field = f"require.{step.requirement if named else 'full'}"
    message = f"{field} forbids what is left to do: {step.part}: {step.fault}, so {step.instead}"
    kind = DeadlineExceeded if step.late else DependencyUnavailable
    return kind(message, param=field, retry_after_s=RETRY_AFTER_S)


def is_refusal(error: TercetError) -> bool:
    """Return whether *error* is one that `forbidden` returned."""
    return error.param is not None and error.param.startswith("require.")
