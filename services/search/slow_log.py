"""The log of slow searches: a line for each, with what it asked for, how it was searched and where the time went."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from services.common.errors import TercetError
from services.common.wire.search import SearchRequest
from services.search.ports import Retrieved
from services.search.quality import Finished
from services.search.run import Run

EVERY_S = 0.1  # When all searches are slow, so many lines tell as much as all of them would.

_log = structlog.get_logger(__name__)


class SlowLog:
    """
    Writes a line `slow_search` for each search that the pipeline took over *slow_s* seconds for, to answer it or to fail; at
    most ten a second.

    Words of the question and values in its filter are written only with *log_queries*.
    """

    def __init__(self, *, slow_s: float, log_queries: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._slow_ms = slow_s * 1000
        self._log_queries = log_queries
        self._clock = clock
        self._not_before = float("-inf")
        self._left_out = 0

    def finished(self, finished: Finished) -> None:
        """Write a line if it was slow; the next line says how many were left out before it."""
        reply, run = finished.reply, finished.run
        if reply.timings_ms.get("total", 0.0) >= self._slow_ms:
            self._write(
                run,
                request_id=reply.request_id,
                collection=reply.collection,
                pipeline=reply.pipeline.model_dump(exclude_none=True),
                degraded=reply.degraded,
                coverage=reply.coverage.ratio,
                hits=len(reply.hits),
                as_of=reply.as_of,
                timings_ms=reply.timings_ms,
                shards=_shards(finished.retrieved),
            )

    def failed(self, run: Run, error: TercetError) -> None:
        """Write a line if it took so long to fail."""
        if (total_ms := run.elapsed_ms()) >= self._slow_ms:
            self._write(
                run,
                request_id=run.request_id,
                collection=run.request.collection,
                error=error.code,
                message=error.message,
                degraded=list(run.degraded),
                timings_ms={**run.timings_ms, "total": total_ms},
            )

    def _write(self, run: Run, **fields: Any) -> None:
        now = self._clock()
        if now < self._not_before:
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        fields["asked"] = _asked(run.request)
        self._not_before = now + EVERY_S
        if self._log_queries:
            fields |= {"query": run.request.query, "filter": run.request.filter}
        if left_out:
            fields["left_out"] = left_out
        _log.warning("slow_search", **fields)


def _asked(request: SearchRequest) -> dict[str, Any]:
    """Return what *request* sets beside what it asks: options and numbers, and the form of its filter."""
    said = request.model_dump(
        mode="json",
        exclude={"query", "query_vector", "filter", "collection"},
        exclude_defaults=True,
        exclude_none=True,
    )
    if request.query is not None:
        said["query_chars"] = len(request.query)
    if request.query_vector is not None:
        said["query_vector"] = True
    if request.filter:
        said["filter"] = without_values(request.filter)
    return said


def without_values(filter: Any) -> Any:
    """Return a filter's fields and operators, with `?` for each value and `n ×` before it for a list of several."""
    if isinstance(filter, Mapping):
        return {name: without_values(value) for name, value in filter.items()}
    if isinstance(filter, list):
        if any(isinstance(part, Mapping) for part in filter):
            return [without_values(part) for part in filter]
        return f"{len(filter)} × ?"
    return "?"


def _shards(retrieved: Retrieved | None) -> list[dict[str, Any]]:
    """Return, for each shard that answered or failed, who answered after how long, by which plan, or why not."""
    if retrieved is None:
        return []
    found: dict[int, dict[str, Any]] = {}
    for shard, call in retrieved.calls.items():
        said: dict[str, Any] = {"host": call.host, "took_ms": round(call.took_ms, 3), "attempts": call.attempts}
        found[shard] = {**said, "hedged": True} if call.hedged else said
    for shard, plan in retrieved.plans.items():
        found.setdefault(shard, {})["plan"] = dict(plan)
    for shard, reason in retrieved.failures.items():
        found.setdefault(shard, {})["failure"] = reason
    return [{"shard": shard, **found[shard]} for shard in sorted(found)]
