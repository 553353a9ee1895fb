"""
The stages of a search: embed, retrieve, fuse, rerank. Each has its share of the time, and a step down where it fails.

What is done in their order, and what becomes of the outcome, is the pipeline's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.common.errors import Conflict, DeadlineExceeded, DependencyUnavailable, NotFound, TercetError
from services.common.wire.search import FusionWeights, LexicalOptions
from services.search.answering import Reader
from services.search.budget import Budget
from services.search.documents import model_text
from services.search.effort import reduced
from services.search.fusion import Ranked, blend, bm25_ceiling, bm25_confidence, fuse
from services.search.indexing import check_fingerprint
from services.search.ladder import RETRY_AFTER_S
from services.search.ports import (
    Embedded,
    EmbeddingClient,
    RerankClient,
    Reranked,
    RetrievalQuery,
    Retrieved,
    Retriever,
    Vector,
)
from services.search.run import Run
from services.search.selection import at_least

_PLAIN = LexicalOptions()
CROWD: Final = 2  # So many searches at the reranker are enough for another one to wait.


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """The settings that decide an answer; a request may override the candidates."""

    candidates: int
    rerank_candidates: int
    dense_weight: float
    rerank_blend: float


class Stages:
    """What each stage does, over the services that it needs; *budget* knows how long they take."""

    def __init__(
        self,
        retriever: Retriever,
        embedding: EmbeddingClient,
        rerank: RerankClient,
        options: PipelineOptions,
        budget: Budget,
    ) -> None:
        self._retriever = retriever
        self._embedding = embedding
        self._rerank = rerank
        self._options = options
        self._budget = budget

    def note_hits(self, seconds: float) -> None:
        """Take note of how long it took to choose, read and write the hits."""
        self._budget.note("hits", seconds)

    # --- the question's vector

    async def embed(self, run: Run) -> Vector | None:
        """
        Return the question's vector, or None, the mode now lexical, where the embedding service cannot give it in time.

        Raises:
            Conflict: Its model is not the collection's.
        """
        assert run.request.query is not None, "the request's validation demands a query here"
        allowed_s = self._budget.allowed_s("embed", run.deadline.remaining_s(), rerank=reranks(run))
        if allowed_s > 0 and (made := await self._embedded(run, allowed_s)) is not None:
            check_fingerprint(run.collection, made.model.fingerprint)
            row: Vector = made.vectors[0]
            return row
        if allowed_s <= 0:
            run.degrade("embedding_late")
        run.mode = "lexical"
        return None

    async def _embedded(self, run: Run, allowed_s: float) -> Embedded | None:
        collection, until = run.collection, run.within("embed", allowed_s)
        query = run.request.query or ""
        timed = run.timed("embed")
        try:
            with timed:
                try:
                    made = await self._embedding.embed_query(query, until, model=collection.model)
                except NotFound:  # What the service runs instead may be the same model by another name.
                    other = await self._embedding.model(until)
                    check_fingerprint(collection, other.fingerprint)
                    made = await self._embedding.embed_query(query, until, model=other.name)
        except Conflict:
            raise
        except DeadlineExceeded:
            self._budget.note_late("embed", allowed_s)
            run.degrade("embedding_late")
        except TercetError:
            run.degrade("embedding_unavailable")
        else:
            self._budget.note("embed", timed.seconds)
            return made
        return None

    # --- candidates

    async def retrieve(self, run: Run, vector: Vector | None, condition: Any) -> tuple[RetrievalQuery, Retrieved]:
        """
        Return what the shards were asked, and what they found.

        Raises:
            DependencyUnavailable, DeadlineExceeded: No shard answered.
        """
        query = self._query(run, vector, condition)
        allowed_s = self._budget.allowed_s("retrieve", run.deadline.remaining_s(), rerank=reranks(run))
        timed = run.timed("retrieve")
        with timed:
            retrieved = await self._retriever.retrieve(run.collection, query, run.within("retrieve", allowed_s))
        for stage, spent_ms in retrieved.timings_ms.items():
            run.timings_ms[stage] = round(spent_ms, 3)
        if retrieved.timed_out:
            self._budget.note_late("retrieve", allowed_s)
        elif retrieved.ok:
            self._budget.note("retrieve", timed.seconds)
        if retrieved.ok == 0 and retrieved.total > 0:
            if retrieved.timed_out:
                raise DeadlineExceeded("The time allowed for this request ran out before any shard answered")
            raise DependencyUnavailable("No shard of the collection can answer now", retry_after_s=RETRY_AFTER_S)
        if retrieved.ok < retrieved.total or retrieved.failures:
            run.degrade("shards_partial")
        if retrieved.lexical_failed:
            run.degrade("lexical_unavailable")
        if retrieved.fallback:
            run.degrade("fallback_index")
        if retrieved.catching_up:
            run.degrade("catching_up")
        return query, retrieved

    def _query(self, run: Run, vector: Vector | None, condition: Any) -> RetrievalQuery:
        request = run.request
        words = request.lexical or _PLAIN
        return RetrievalQuery(
            limit=max(request.candidates or self._options.candidates, request.offset + request.k),
            vector=vector if run.mode != "lexical" else None,
            text=request.query if run.mode != "dense" else None,
            filter=condition,
            match=words.match,
            prefix=words.prefix,
            stop_words=words.stop_words,
            exact=request.exact,
            explain=True,  # It costs next to nothing, and the log of slow searches tells the plan of any.
            facets=request.facets,
        )

    def fuse(self, run: Run, retrieved: Retrieved) -> tuple[list[Ranked], FusionWeights | None]:
        """Return the order of retrieval, above a threshold on its scores, and the weights where two lists became one."""
        candidates, method = retrieved.candidates, run.request.fusion
        dense_weight = self._options.dense_weight
        ceiling = bm25_ceiling(retrieved.terms, retrieved.statistics)
        ranked = fuse(candidates, method=method, dense_weight=dense_weight, ceiling=ceiling)
        weights = None
        if run.request.explain and ranked and ranked[0].score_kind == "fused":
            confidence = 1.0 if method == "rrf" else bm25_confidence(candidates, ceiling)
            shares = (1.0, 1.0) if method == "rrf" else (dense_weight, (1.0 - dense_weight) * confidence)
            weights = FusionWeights(
                method=method, dense=shares[0], bm25=round(shares[1], 6), bm25_confidence=round(confidence, 6)
            )
        threshold = run.request.min_score
        if threshold is None or threshold.kind == "rerank" or (threshold.kind == "dense" and run.mode == "lexical"):
            return ranked, weights
        return _above(run, ranked), weights

    # --- the last order

    async def rerank(self, run: Run, ranked: list[Ranked], reader: Reader, pressure: float) -> list[Ranked]:
        """
        Return the last order, above a threshold on its score; the fused order where the reranker cannot help in time.

        The best are reranked, as many as *pressure* (0 to 1) and the time that is left allow; the others follow them.
        """
        asked = min(run.request.rerank_candidates or self._options.rerank_candidates, len(ranked))
        # Under the pressure of something else that hangs the reranker is idle, and fewer candidates would help nobody.
        wanted = reduced(asked, pressure) if self._rerank.under_way >= CROWD else asked
        if wanted < asked:
            run.check("rerank_reduced")
        run.affordable = self._budget.affordable(run.deadline.remaining_s())
        if run.affordable == 0:
            run.degrade("rerank_late")
            return ranked
        first = ranked[: min(wanted, run.affordable)]
        if len(first) < wanted:
            run.check("rerank_partial")
        documents = await reader.read(first, "fetch")
        there = [entry for entry in first if entry.candidate.id in documents]
        texts = [model_text(d.title, d.text) for d in (documents[entry.candidate.id] for entry in there)]
        scored = await self._scored(run, texts, [entry.fused for entry in there]) if texts else None
        if scored is None:
            return ranked
        run.reranked = sum(score is not None for score in scored.scores)
        if wanted < asked:
            run.degrade("rerank_reduced")
        if run.reranked < len(texts) or len(first) < wanted:
            run.degrade("rerank_partial")
        weight = self._options.rerank_blend
        last = blend([*there, *ranked[len(first) :]], scored.scores, weight=weight, coarse=scored.coarse)
        threshold = run.request.min_score
        return _above(run, last) if threshold is not None and threshold.kind == "rerank" else last

    async def _scored(self, run: Run, texts: Sequence[str], priors: Sequence[float]) -> Reranked | None:
        """Return what the reranker made of *texts* in time; None, with the reason noted, if it made nothing."""
        assert run.request.query is not None, "the caller saw to it"
        allowed_s = self._budget.rerank_s(len(texts), run.deadline.remaining_s())
        timed = run.timed("rerank")
        try:
            if allowed_s <= 0:
                raise DeadlineExceeded("Reading what is to be reranked took the time that was left")
            with timed:
                until = run.within("rerank", allowed_s)
                scored = await self._rerank.rerank(run.request.query, texts, until, priors=priors)
            judged = sum(score is not None for score in scored.scores)
            if judged == 0:
                raise DeadlineExceeded("No candidate was reranked in the time that was left")
        except DeadlineExceeded:
            self._budget.note_rerank_late(len(texts), allowed_s)
            run.degrade("rerank_late")
            return None
        except TercetError:  # Down, overloaded, or it refuses a query that retrieval could read.
            run.degrade("rerank_unavailable")
            return None
        self._budget.note_reranked(judged, timed.seconds)
        run.reranked_by = scored.model
        return scored


def reranks(run: Run) -> bool:
    """Return whether the search's last stage is reranking."""
    return run.request.rerank and run.request.query is not None


def _above(run: Run, ranked: list[Ranked]) -> list[Ranked]:
    """Return what reaches the request's threshold, counting what does not."""
    assert run.request.min_score is not None, "the caller saw to it"
    kept = at_least(ranked, run.request.min_score.kind, run.request.min_score.value)
    run.below_min_score += len(ranked) - len(kept)
    return kept
