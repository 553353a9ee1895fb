"""From the last order to the answer: documents read once, the page chosen, hits, highlights and what they are worth."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from services.common.wire.search import (
    BudgetExplanation,
    CacheReply,
    CandidateCounts,
    Coverage,
    Explanation,
    FusionWeights,
    HighlightReply,
    Hit,
    PipelineReply,
    SearchReply,
    ShardCoverage,
    ShardFailure,
    ShardPlan,
)
from services.search.fusion import Ranked
from services.search.ports import Highlighter, Retrieved, Retriever, ShardCall, ShardDocument, Vector
from services.search.run import Run
from services.search.selection import GroupKey, diversify, first_of_each, group_key, head

READ_SHARE = 0.5  # Of the time left, to read stored fields: a shard that hangs must leave some for the others' hits.
DIVERSE = 200  # Of so many of the best the order is made diverse: each is compared with each.

_MADE = CacheReply(hit=False)
_HITS = TypeAdapter(list[Hit])  # All of a page at once, in pydantic's own code: each by itself takes twice as long.


class Reader:
    """The stored fields of one search's candidates, each asked for once unless its vector is wanted later."""

    def __init__(self, run: Run, retriever: Retriever) -> None:
        self._run = run
        self._retriever = retriever
        self._known: dict[str, ShardDocument | None] = {}
        self._with_vector: set[str] = set()
        self.lost: set[int] = set()  # the shards whose documents were not all there
        self.failed: set[int] = set()  # those of them that could not be asked
        self.late: set[int] = set()  # those of these that ran out of time

    async def read(self, entries: Iterable[Ranked], stage: str, *, vectors: bool = False) -> dict[str, ShardDocument]:
        """
        Return the documents of *entries* by id; as they are now: those deleted since they were found are missing.

        A shard that could not be asked once is not waited for again.
        """
        candidates = [entry.candidate for entry in entries]
        known = self._with_vector if vectors else self._known
        missing = [c for c in candidates if c.id not in known and c.shard not in self.failed]
        if missing:
            with self._run.timed(stage):
                until = self._run.patience(READ_SHARE)
                fetched = await self._retriever.fetch(self._run.collection, missing, until, vectors=vectors)
            found = fetched.documents
            self.failed |= fetched.failed
            self.late |= fetched.late
            for candidate in missing:
                if candidate.id not in found:
                    self.lost.add(candidate.shard)
                    if candidate.shard in fetched.failed:
                        continue
                self._known[candidate.id] = found.get(candidate.id, self._known.get(candidate.id))
                if vectors:
                    self._with_vector.add(candidate.id)
        return {c.id: document for c in candidates if (document := self._known.get(c.id)) is not None}

    def forgive(self) -> None:
        """Let the shards that could not be asked be asked once more."""
        self.lost -= self.failed
        self.failed.clear()
        self.late.clear()


async def choose(run: Run, ranked: Sequence[Ranked], reader: Reader) -> list[Ranked]:
    """
    Return the page that the request asks for: groups first, then diversity, then the window of offset and k.

    With diversity the first 200 hits of the best score kind change places; those after them keep their order.
    """
    request = run.request
    depth = request.offset + request.k
    if request.group_by is not None:
        enough = max(depth, DIVERSE) if request.diversity else depth
        ranked = await _grouped(ranked, request.group_by, enough, reader, vectors=request.diversity > 0)
    if request.diversity:
        size = head(ranked, DIVERSE)
        found = await reader.read(ranked[:size], "fetch_vectors", vectors=True)
        with run.timed("diversify"):
            ranked = [*_diverse(ranked[:size], found, request.diversity, depth), *ranked[size:]]
    return list(ranked[request.offset : depth])


def _diverse(
    ranked: Sequence[Ranked], documents: Mapping[str, ShardDocument], diversity: float, limit: int
) -> list[Ranked]:
    """Return *ranked* made diverse; those that are gone, and have no vector, come last."""
    there: list[Ranked] = []
    gone: list[Ranked] = []
    vectors: list[Vector] = []
    for entry in ranked:
        document = documents.get(entry.candidate.id)
        if document is None or document.vector is None:
            gone.append(entry)
        else:
            there.append(entry)
            vectors.append(document.vector)
    return [*diversify(there, vectors, diversity, limit=limit), *gone]


async def _grouped(ranked: Sequence[Ranked], field: str, depth: int, reader: Reader, *, vectors: bool) -> list[Ranked]:
    """Return the best entry of each of the first *depth* groups, reading only as far down as they take."""
    keyed: list[tuple[Ranked, GroupKey]] = []
    first: list[Ranked] = []
    while len(keyed) < len(ranked) and len(first) < depth:
        part = ranked[len(keyed) : 2 * len(keyed) + depth]
        found = await reader.read(part, "fetch_groups", vectors=vectors)
        for entry in part:
            document = found.get(entry.candidate.id)
            metadata = {} if document is None else document.metadata  # One that is gone is left out of the hits.
            keyed.append((entry, group_key(entry.candidate.id, metadata, field)))
        first = list(first_of_each(keyed))
    return first[:depth]


async def write_hits(
    run: Run, page: Sequence[Ranked], reader: Reader, highlighter: Highlighter, terms: Sequence[str]
) -> list[Hit]:
    """Return the hits of *page* with what the request includes; documents that are gone are left out."""
    include = run.request.include
    documents = await reader.read(page, "fetch_hits", vectors="vector" in include)
    if page and not documents and reader.failed:
        reader.forgive()  # There is nothing else to show, and perhaps it was only that too little time was given.
        documents = await reader.read(page, "fetch_hits", vectors="vector" in include)
    there = [(entry, documents[entry.candidate.id]) for entry in page if entry.candidate.id in documents]
    highlights: Mapping[str, list[HighlightReply]] = {}
    if "highlights" in include:
        with run.timed("highlight"):
            texts = {document.id: document.text for _, document in there}
            highlights = await asyncio.to_thread(_highlights, run, texts, highlighter, terms)
    hits = [
        {
            "id": document.id,
            "score": round(entry.score, 6),
            "score_kind": entry.score_kind,
            "title": document.title,
            "text": document.text if "text" in include else None,
            "metadata": document.metadata if "metadata" in include else None,
            "vector": document.vector.tolist() if "vector" in include and document.vector is not None else None,
            "highlights": highlights.get(document.id),
            "stages": _stages(entry),
        }
        for entry, document in there
    ]
    return _HITS.validate_python(hits)


def _highlights(
    run: Run, texts: Mapping[str, str], highlighter: Highlighter, terms: Sequence[str]
) -> dict[str, list[HighlightReply]]:
    made: dict[str, list[HighlightReply]] = {}
    for id_, text in texts.items():
        found = highlighter.highlight(text, terms, run.collection.language, max_chars=run.request.highlights_max_chars)
        made[id_] = [] if found is None else [HighlightReply(text=found.text, marks=list(found.marks))]
    return made


def _stages(entry: Ranked) -> dict[str, float]:
    candidate = entry.candidate
    scores = {"fused": round(entry.fused, 6)}
    if candidate.dense is not None:
        scores["dense"] = round(candidate.dense, 6)
    if candidate.bm25 is not None:
        scores["bm25"] = round(candidate.bm25, 6)
    if entry.rerank is not None:
        scores["rerank"] = round(entry.rerank, 6)
    return scores


def compose(
    run: Run, hits: list[Hit], retrieved: Retrieved, weights: FusionWeights | None, breakers: Mapping[str, str]
) -> SearchReply:
    """Return the whole reply: the hits, and what they are worth; *breakers* is for who wants it explained."""
    return SearchReply(
        collection=run.collection.name,
        hits=hits,
        coverage=_coverage(run, retrieved),
        degraded=run.degraded,
        pipeline=PipelineReply(retrieval=run.mode, rerank=run.reranked_by),
        cache=_MADE,
        as_of=retrieved.as_of,
        timings_ms=run.timings_ms,
        facets=_facets(run, retrieved),
        explain=_explain(run, retrieved, weights, breakers) if run.request.explain else None,
        request_id=run.request_id,
    )


def _coverage(run: Run, retrieved: Retrieved) -> Coverage:
    failures = dict(retrieved.failures)
    for shard in run.unread - failures.keys():
        failures[shard] = "it did not give the documents that it had found"
    ok = retrieved.ok - (len(failures) - len(retrieved.failures))
    shards = ShardCoverage(
        total=retrieved.total,
        ok=ok,
        fallback=retrieved.fallback,
        timed_out=retrieved.timed_out,
        failed=len(failures),
        breaker_open=retrieved.breaker_open,
        catching_up=retrieved.catching_up,
    )
    return Coverage(
        ratio=round(ok / retrieved.total, 4) if retrieved.total else 1.0,
        shards=shards,
        failures=[ShardFailure(shard=shard, reason=reason) for shard, reason in sorted(failures.items())],
    )


def _facets(run: Run, retrieved: Retrieved) -> dict[str, dict[str, int]] | None:
    if not run.request.facets:
        return None
    return {field: dict(retrieved.facets.get(field, {})) for field in run.request.facets}


def _explain(run: Run, retrieved: Retrieved, weights: FusionWeights | None, breakers: Mapping[str, str]) -> Explanation:
    candidates = retrieved.candidates
    return Explanation(
        shards=[
            _shard_plan(shard, retrieved.plans.get(shard, {}), retrieved.calls.get(shard))
            for shard in sorted(retrieved.plans.keys() | retrieved.calls.keys())
        ],
        candidates=CandidateCounts(
            total=len(candidates),
            dense=sum(candidate.dense is not None for candidate in candidates),
            bm25=sum(candidate.bm25 is not None for candidate in candidates),
            reranked=run.reranked,
            below_min_score=run.below_min_score,
        ),
        fusion=weights,
        cache=run.cache,
        budget=BudgetExplanation(timeout_ms=run.timeout_ms, stages_ms=run.allowed_ms, rerank_candidates=run.affordable),
        admission=run.admission,
        breakers=dict(breakers),
    )


def _shard_plan(shard: int, plan: Mapping[str, Any], call: ShardCall | None) -> ShardPlan:
    if call is None:
        return ShardPlan(shard=shard, plan=dict(plan))
    return ShardPlan(
        shard=shard,
        plan=dict(plan),
        host=call.host,
        took_ms=round(call.took_ms, 3),
        applied_seq=call.applied_seq,
        attempts=call.attempts,
        hedged=call.hedged,
    )
