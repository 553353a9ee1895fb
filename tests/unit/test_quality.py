"""What is measured of the quality of answers: recall on a sample, agreement, steps down; and the log of slow searches."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable
from services.common.metrics import Metrics
from services.common.wire.search import (
    CacheReply,
    Coverage,
    Degradation,
    PipelineReply,
    SearchReply,
    SearchRequest,
    ShardCoverage,
)
from services.search.metrics import SearchMetrics
from services.search.ports import Candidate, Collection, RetrievalQuery, Retrieved, ShardCall
from services.search.quality import Finished, ShadowSearch, Watched, agreement, recall_at
from services.search.run import Run
from services.search.slow_log import SlowLog, without_values

BOOKS = Collection("uuid-books", "books", "m", "m@1", 2, 2, 0.0)
VECTOR = np.array([1.0, 0.0], dtype=np.float32)
EXACT = [Candidate(f"d{n}", 0, n, 1.0 - n / 100, None) for n in range(20)]
SECRET = "whose words are these"


def retrieved(candidates: Sequence[Candidate], **fields: Any) -> Retrieved:
    """Return what two shards that answered found."""
    return replace(Retrieved(candidates, 2, 2, 0, {}, 0, 9, {}), **fields)


def finished(
    found: Retrieved | None = None,
    *,
    degraded: Sequence[Degradation] = (),
    total_ms: float = 5.0,
    stale: bool = False,
    fused: Sequence[str] = (),
    last: Sequence[str] = (),
    request: SearchRequest | None = None,
    **query: Any,
) -> Finished:
    """Return a search that ended."""
    request = request or SearchRequest(query=SECRET)
    run = Run(request, BOOKS, Deadline(), lambda _stage, _seconds: None, request.mode)
    reply = SearchReply(
        collection="books",
        hits=[],
        coverage=Coverage(ratio=1.0, shards=ShardCoverage(total=2, ok=2)),
        degraded=list(degraded),
        pipeline=PipelineReply(retrieval=request.mode),
        cache=CacheReply(hit=stale, stale=stale),
        as_of=9,
        timings_ms={"retrieve": 1.0, "total": total_ms},
        request_id="r-1",
    )
    asked = RetrievalQuery(**{"limit": 100, "vector": VECTOR, "text": SECRET, **query})
    return Finished(run, None if stale else asked, found, fused, last, reply)


class ExactRetriever:
    """Answers with EXACT, once it is let; it keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[RetrievalQuery] = []
        self.answer = retrieved(EXACT)
        self.error: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def retrieve(self, collection: Collection, query: RetrievalQuery, deadline: Deadline) -> Retrieved:
        self.asked.append(query)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return self.answer


class Shadow:
    """A shadow search that is drawn every time, over an exact retriever, with all that it reports."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.retriever = ExactRetriever()
        self.recalls: list[float] = []
        self.samples: list[str] = []
        self.pressure = 0.0
        self.drawn = 0.5
        self.now = 0.0
        self.search = ShadowSearch(
            self.retriever,
            ratio=ratio,
            report=self.recalls.append,
            note=self.samples.append,
            pressure=lambda: self.pressure,
            draw=lambda: self.drawn,
            clock=lambda: self.now,
        )

    async def see(self, search: Finished) -> None:
        """Show it a search, and let what it began come to its end."""
        self.search.finished(search)
        for _ in range(3):
            await asyncio.sleep(0)


# --- measures


def test_recall_is_the_share_of_the_ten_nearest_that_were_found():
    """Only the ten nearest count, however many more either side has."""
    assert recall_at(EXACT, EXACT) == 1.0
    assert recall_at([*EXACT[:7], *EXACT[10:]], EXACT) == pytest.approx(0.7)
    assert recall_at([], EXACT) == 0.0
    assert recall_at(EXACT[:2], EXACT[:3]) == pytest.approx(2 / 3)
    assert recall_at(EXACT, []) is None


def test_equally_near_documents_stand_for_each_other():
    """Which of several equal documents was found says nothing about recall, nor does the last digit of a sum."""
    same = [Candidate(f"s{n}", 0, n, 0.5, None) for n in range(30)]
    other = [replace(one, dense=0.5000004) for one in same[15:25]]
    assert recall_at(other, same[:10]) == 1.0


def test_candidates_without_a_vectors_score_are_not_found():
    """A document that has no dense score was not found by its vector."""
    assert recall_at([replace(one, dense=None) for one in EXACT], EXACT) == 0.0


def test_agreement_is_the_share_of_the_first_ten_that_stay():
    """Lists of ten or fewer have the same first ten however they are ordered, and say nothing."""
    before = [f"d{n}" for n in range(30)]
    assert agreement(before, before) == 1.0
    assert agreement(before, [*before[5:], *before[:5]]) == 0.5
    assert agreement(before, [*before[20:], *before[:20]]) == 0.0
    assert agreement(before[:10], before[:10]) is None
    assert agreement(before, []) is None


# --- the sample


async def test_a_drawn_question_is_asked_again_exactly():
    """The same vector and filter, ten deep, without words; what live retrieval lacks of them is the measure."""
    shadow = Shadow()
    await shadow.see(finished(retrieved(EXACT[1:]), filter="f", facets={"kind": 3}, explain=True))
    [asked] = shadow.retriever.asked
    assert (asked.exact, asked.limit, asked.text, asked.filter, asked.facets) == (True, 10, None, "f", {})
    assert asked.vector is VECTOR
    assert (shadow.recalls, shadow.samples) == ([0.9], ["measured"])


async def test_a_share_of_the_questions_is_drawn():
    """A question whose draw is not under the ratio is left alone."""
    shadow = Shadow(ratio=0.1)
    for shadow.drawn in (0.05, 0.1, 0.9):
        await shadow.see(finished(retrieved(EXACT)))
    assert len(shadow.retriever.asked) == 1


@pytest.mark.parametrize(
    "search",
    [
        finished(retrieved(EXACT), vector=None),
        finished(retrieved(EXACT), exact=True),
        finished(retrieved(EXACT, ok=1)),
        finished(retrieved(EXACT, fallback=1)),
        finished(None, stale=True),
    ],
    ids=["words alone", "exact already", "a shard missing", "fallback index", "nothing retrieved"],
)
async def test_what_says_nothing_about_recall_is_not_measured(search: Finished):
    """Recall is of approximate vector search over all shards by their own indexes."""
    shadow = Shadow()
    await shadow.see(search)
    assert (shadow.retriever.asked, shadow.samples) == ([], [])


async def test_measuring_gives_way():
    """One at a time, none under pressure, and after each a rest of twenty times its duration."""
    shadow = Shadow()
    shadow.retriever.go.clear()
    await shadow.see(finished(retrieved(EXACT)))
    await shadow.see(finished(retrieved(EXACT)))
    assert (len(shadow.retriever.asked), shadow.samples) == (1, ["skipped"])
    shadow.now = 0.1
    shadow.retriever.go.set()
    await asyncio.sleep(0)
    for shadow.now in (0.2, 2.0, 2.2):
        await shadow.see(finished(retrieved(EXACT)))
    assert shadow.samples == ["skipped", "measured", "skipped", "skipped", "measured"]
    shadow.now, shadow.pressure = 9.0, 0.1
    await shadow.see(finished(retrieved(EXACT)))
    assert (len(shadow.retriever.asked), shadow.samples[-1]) == (2, "skipped")


async def test_a_sample_that_cannot_be_compared_is_none():
    """After a write between the two searches, or where the exact one fails or lacks a shard, nothing is reported."""
    shadow = Shadow()
    shadow.retriever.answer = retrieved(EXACT, as_of=10)
    await shadow.see(finished(retrieved(EXACT)))
    shadow.retriever.answer = retrieved(EXACT, ok=1)
    await shadow.see(finished(retrieved(EXACT)))
    for shadow.retriever.error in (DependencyUnavailable("down"), RuntimeError("broken")):
        with capture_logs():
            await shadow.see(finished(retrieved(EXACT)))
    assert shadow.samples == ["moved", "failed", "failed", "failed"]
    assert shadow.recalls == []


async def test_closing_ends_a_measurement_under_way():
    """Nothing is left running, and closing twice or before any does no harm."""
    shadow = Shadow()
    await shadow.search.aclose()
    shadow.retriever.go.clear()
    await shadow.see(finished(retrieved(EXACT)))
    await shadow.search.aclose()
    await shadow.search.aclose()
    assert len(asyncio.all_tasks()) == 1


# --- counting


def series(metrics: Metrics) -> dict[str, float]:
    """Return the samples by name and labels' values."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if family.name.startswith(("tercet_search", "tercet_retrieval", "tercet_rerank"))
    }


def test_every_series_exists_before_the_first_search():
    """An alert on a step down needs its 0; agreement is unknown until something was reranked."""
    metrics = Metrics("search")
    SearchMetrics(metrics)
    said = series(metrics)
    for outcome in ("whole", "degraded", "stale"):
        assert said[f"tercet_search_answers_total {outcome}"] == 0
    for reason in ("shards_partial", "stale", "rerank_reduced", "lexical_unavailable"):
        assert said[f"tercet_search_degraded_total {reason}"] == 0
    assert said["tercet_search_stage_seconds_count embed"] == 0
    assert said["tercet_retrieval_recall_at_10_count"] == 0
    assert said["tercet_retrieval_recall_samples_total skipped"] == 0
    assert np.isnan(said["tercet_rerank_agreement"])


def test_answers_are_counted_by_what_they_are_worth():
    """Each search once by its outcome, each step down by its reason, each missing shard."""
    metrics = Metrics("search")
    watched = SearchMetrics(metrics)
    watched.finished(finished(retrieved(EXACT)))
    watched.finished(finished(retrieved(EXACT, ok=1), degraded=["shards_partial", "rerank_late"]))
    watched.finished(finished(None, degraded=["stale"], stale=True))
    said = series(metrics)
    assert [said[f"tercet_search_answers_total {outcome}"] for outcome in ("whole", "degraded", "stale")] == [1, 1, 1]
    assert [
        said[f"tercet_search_degraded_total {reason}"] for reason in ("shards_partial", "rerank_late", "stale")
    ] == [
        1,
        1,
        1,
    ]
    assert said["tercet_search_shards_missing_total"] == 1


def test_agreement_is_that_of_the_last_searches():
    """The gauge is the mean over the last 200 that were reranked; others leave it as it is."""
    metrics = Metrics("search")
    watched = SearchMetrics(metrics)
    ids = [f"d{n}" for n in range(30)]
    watched.finished(finished(retrieved(EXACT), fused=ids, last=[*ids[20:], *ids[:20]]))
    watched.finished(finished(retrieved(EXACT), fused=ids, last=ids))
    watched.finished(finished(retrieved(EXACT), fused=ids))
    assert series(metrics)["tercet_rerank_agreement"] == 0.5
    for _ in range(200):
        watched.finished(finished(retrieved(EXACT), fused=ids, last=ids))
    assert series(metrics)["tercet_rerank_agreement"] == 1.0


def test_recall_and_stages_are_histograms():
    """A recall of 0.9 is in the bucket up to 0.9; a stage nobody thought of has its series too."""
    metrics = Metrics("search")
    watched = SearchMetrics(metrics)
    watched.note_recall(0.9)
    watched.note_sample("measured")
    watched.note_stage("diversify", 0.0002)
    said = series(metrics)
    assert (said["tercet_retrieval_recall_at_10_bucket 0.8"], said["tercet_retrieval_recall_at_10_bucket 0.9"]) == (
        0,
        1,
    )
    assert said["tercet_retrieval_recall_samples_total measured"] == 1
    assert said["tercet_search_stage_seconds_count diversify"] == 1


def test_an_observer_that_fails_holds_up_no_other():
    """A fault in watching is logged, and neither the search nor the other observers notice."""
    seen: list[Finished] = []

    def broken(_: Finished) -> None:
        raise RuntimeError("broken")

    with capture_logs() as logs:
        Watched([broken, seen.append]).finished(search := finished(retrieved(EXACT)))
    assert seen == [search]
    assert [line["event"] for line in logs] == ["watching_failed"]


# --- the slow log


def lines(log: SlowLog, *searches: Finished) -> list[dict[str, Any]]:
    """Return what *log* writes of *searches*."""
    with capture_logs() as written:
        for search in searches:
            log.finished(search)
    return [dict(line) for line in written]


def test_only_slow_searches_are_logged():
    """From the limit on, as the reply's own total has it."""
    log = SlowLog(slow_s=1.0, log_queries=False)
    assert lines(log, finished(retrieved(EXACT), total_ms=999.0)) == []
    [line] = lines(log, finished(retrieved(EXACT), total_ms=1000.0, degraded=["rerank_late"]))
    assert (line["event"], line["request_id"], line["collection"]) == ("slow_search", "r-1", "books")
    assert (line["degraded"], line["timings_ms"]["total"]) == (["rerank_late"], 1000.0)


def test_searches_that_were_long_to_fail_are_logged():
    """With the error and the time of the stages that ended; what fails at once is not slow."""
    run = finished(request=SearchRequest(query=SECRET, collection="books")).run
    run.timings_ms["embed"] = 2.0
    with capture_logs() as written:
        SlowLog(slow_s=60.0, log_queries=False).failed(run, DeadlineExceeded("too late"))
        SlowLog(slow_s=0.0, log_queries=False).failed(run, DeadlineExceeded("too late"))
    [line] = written
    assert (line["event"], line["error"], line["message"]) == ("slow_search", "deadline_exceeded", "too late")
    assert set(line["timings_ms"]) == {"embed", "total"}
    assert SECRET not in str(line)


def test_the_line_has_the_plan():
    """Options that were set, and for each shard who answered, when, by which plan, or why not."""
    found = retrieved(
        EXACT,
        plans={0: {"vectors": {"kind": "hnsw"}}},
        calls={0: ShardCall("node-a", 812.3456, 9, attempts=2, hedged=True)},
        failures={1: "it does not answer"},
    )
    request = SearchRequest(query=SECRET, k=50, rerank=False, facets={"kind": 3})
    [line] = lines(SlowLog(slow_s=1.0, log_queries=False), finished(found, total_ms=2000.0, request=request))
    assert line["asked"] == {"k": 50, "rerank": False, "facets": {"kind": 3}, "query_chars": len(SECRET)}
    assert line["shards"] == [
        {
            "shard": 0,
            "host": "node-a",
            "took_ms": 812.346,
            "attempts": 2,
            "hedged": True,
            "plan": {"vectors": {"kind": "hnsw"}},
        },
        {"shard": 1, "failure": "it does not answer"},
    ]


def test_what_was_asked_is_told_only_if_it_may_be():
    """Neither words nor a filter's values are in the line; with `log_queries` both are."""
    filter = {"owner": "alice", "year": {"$gte": 1999}}
    search = finished(retrieved(EXACT), total_ms=2000.0, request=SearchRequest(query=SECRET, filter=filter))
    [line] = lines(SlowLog(slow_s=1.0, log_queries=False), search)
    assert not any(word in str(line) for word in (SECRET, "alice", "1999"))
    assert line["asked"]["filter"] == {"owner": "?", "year": {"$gte": "?"}}
    [line] = lines(SlowLog(slow_s=1.0, log_queries=True), search)
    assert (line["query"], line["filter"]) == (SECRET, filter)


def test_a_filters_form_keeps_fields_and_operators():
    """Of a list of values only the number is told; of a list of conditions each."""
    assert without_values({"$or": [{"a": {"$in": [1, 2, 3]}}, {"$not": {"b": True}}]}) == {
        "$or": [{"a": {"$in": "3 × ?"}}, {"$not": {"b": "?"}}]
    }


def test_a_flood_of_slow_searches_is_ten_lines_a_second():
    """The next line says how many were left out before it."""
    now = 0.0
    log = SlowLog(slow_s=1.0, log_queries=False, clock=lambda: now)
    slow = finished(retrieved(EXACT), total_ms=2000.0)
    assert len(lines(log, slow, slow, slow)) == 1
    now = 0.1
    [line] = lines(log, slow)
    assert line["left_out"] == 2
    now = 0.2
    [line] = lines(log, slow)
    assert "left_out" not in line


def test_a_stale_answer_has_no_plan():
    """Where nothing could be retrieved there is no shard to tell of."""
    [line] = lines(SlowLog(slow_s=1.0, log_queries=False), finished(None, stale=True, total_ms=3000.0))
    assert line["shards"] == []
