"""The read path: cache → embed → retrieve → fuse → rerank → choose, with a step down, and its name, for each failure."""

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from services.common.deadline import Deadline
from services.common.errors import (
    Conflict,
    DeadlineExceeded,
    DependencyUnavailable,
    InvalidInput,
    NotFound,
    TercetError,
    Unavailable,
)
from services.common.wire.search import FusionWeights, LexicalOptions, SearchReply, SearchRequest
from services.search.answering import Reader, choose, compose, write_hits
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.documents import model_text, own_vector
from services.search.filters import parse_filter
from services.search.fusion import Ranked, blend, bm25_ceiling, bm25_confidence, fuse
from services.search.indexing import check_fingerprint
from services.search.kept_answers import KeptAnswers
from services.search.kinds import kind_of
from services.search.ports import (
    EmbeddingClient,
    Highlighter,
    Ledger,
    RerankClient,
    ResultCache,
    RetrievalQuery,
    Retrieved,
    Retriever,
    Vector,
)
from services.search.run import Observe, Run
from services.search.selection import at_least

# Shares of the time that is left: a stage that uses all of its own leaves enough for the step down after it.
EMBED_SHARE = 0.5
RETRIEVE_SHARE = 0.8
FINISH_S = 0.03  # Kept back after reranking to fetch and write the hits.


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """The settings that the pipeline uses; a request may override the candidates."""

    candidates: int
    rerank_candidates: int
    dense_weight: float
    rerank_blend: float


class SearchPipeline:
    """Answers questions over the catalog's collections."""

    def __init__(
        self,
        catalog: Catalog,
        ledger: Ledger,
        retriever: Retriever,
        embedding: EmbeddingClient,
        rerank: RerankClient,
        cache: ResultCache,
        options: PipelineOptions,
        *,
        highlighter: Highlighter,
        observe: Observe = lambda _stage, _seconds: None,
    ) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding
        self._rerank = rerank
        self._kept = KeptAnswers(cache, ledger, astuple(options))
        self._options = options
        self._highlighter = highlighter
        self._observe = observe

    async def search(self, request: SearchRequest, deadline: Deadline, *, request_id: str | None = None) -> SearchReply:
        """
        Answer *request* before *deadline*, stepping down where a part fails; `degraded` names each step.

        The ledger's database is asked only for a `min_seq` that this process has not heard of.

        Raises:
            NotFound: There is no such collection.
            InvalidInput: The filter, a facet or the vector is wrong for the collection.
            Conflict: The embedding service's model is not the collection's.
            DependencyUnavailable, DeadlineExceeded: No shard answered.
        """
        started = time.perf_counter()
        collection = await self._catalog.get(request.collection)
        run = Run(request, collection, deadline, self._observe, request.mode)
        condition, vector = _understood(run)
        run.seq, run.epoch = self._ledger.heard_seq(collection.uuid), self._ledger.epoch
        await self._wait_for(run)
        key = self._kept.key(run)
        if key is not None:
            kept = await self._kept.find(run, key)
            if kept is not None:
                kept_ms = round((time.perf_counter() - started) * 1000, 3)
                return kept.model_copy(update={"request_id": request_id, "timings_ms": {"total": kept_ms}})
        if vector is None and request.mode != "lexical":
            vector = await self._embed(run)
        retrieved = await self._retrieve(run, vector, condition)
        with run.timed("fuse"):
            ranked, weights = self._fused(run, retrieved)
        reader = Reader(run, self._retriever)
        if request.rerank and request.query is not None and ranked:
            ranked = await self._reranked(run, ranked, reader)
        page = await choose(run, ranked, reader)
        hits = await write_hits(run, page, reader, self._highlighter, retrieved.terms)
        total = time.perf_counter() - started
        self._observe("total", total)
        run.timings_ms["total"] = round(total * 1000, 3)
        reply = compose(run, hits, retrieved, weights, request_id)
        if key is not None:
            await self._kept.keep(run, key, reply)
        return reply

    async def _wait_for(self, run: Run) -> None:
        """Wait for the operation the caller wants to see; the time it takes comes out of the search's own."""
        min_seq = run.request.min_seq
        if min_seq is None:
            return
        if min_seq > run.seq:
            try:
                run.seq = max(run.seq, (await self._ledger.state(run.collection.uuid)).seq)
            except Unavailable:  # Then whether there is such an operation is for the shards to find out.
                pass
            else:
                if min_seq > run.seq:
                    raise InvalidInput(f"min_seq: {min_seq} is after the last operation, {run.seq}", param="min_seq")
        with run.timed("wait"):
            if not await self._retriever.wait_applied(run.collection, min_seq, run.patience(EMBED_SHARE)):
                run.degrade("catching_up")
        run.seq = max(run.seq, min_seq)

    async def _embed(self, run: Run) -> Vector | None:
        """Return the query's vector, or None, the mode now lexical, when the embedding service cannot give it in time."""
        assert run.request.query is not None, "the request's validation demands a query here"
        collection, patience = run.collection, run.patience(EMBED_SHARE)
        try:
            with run.timed("embed"):
                try:
                    made = await self._embedding.embed_query(run.request.query, patience, model=collection.model)
                except NotFound:  # What the service runs instead may be the same model by another name.
                    other = await self._embedding.model(patience)
                    check_fingerprint(collection, other.fingerprint)
                    made = await self._embedding.embed_query(run.request.query, patience, model=other.name)
        except Conflict:
            raise
        except DeadlineExceeded:
            run.degrade("embedding_late")
        except TercetError:
            run.degrade("embedding_unavailable")
        else:
            check_fingerprint(collection, made.model.fingerprint)
            row: Vector = made.vectors[0]
            return row
        run.mode = "lexical"
        return None

    async def _retrieve(self, run: Run, vector: Vector | None, condition: Any) -> Retrieved:
        request = run.request
        words = request.lexical or LexicalOptions()
        query = RetrievalQuery(
            limit=max(request.candidates or self._options.candidates, request.offset + request.k),
            vector=vector if run.mode != "lexical" else None,
            text=request.query if run.mode != "dense" else None,
            filter=condition,
            match=words.match,
            prefix=words.prefix,
            stop_words=words.stop_words,
            exact=request.exact,
            explain=request.explain,
            facets=request.facets,
        )
        with run.timed("retrieve"):
            retrieved = await self._retriever.retrieve(run.collection, query, run.patience(RETRIEVE_SHARE))
        run.timings_ms |= {stage: round(ms, 3) for stage, ms in retrieved.timings_ms.items()}
        if retrieved.ok == 0 and retrieved.total > 0:
            if retrieved.timed_out:
                raise DeadlineExceeded("The time allowed for this request ran out before any shard answered")
            raise DependencyUnavailable("No shard of the collection can answer now", retry_after_s=1.0)
        if retrieved.ok < retrieved.total or retrieved.failures:
            run.degrade("shards_partial")
        if retrieved.fallback:
            run.degrade("fallback_index")
        if retrieved.catching_up:
            run.degrade("catching_up")
        return retrieved

    def _fused(self, run: Run, retrieved: Retrieved) -> tuple[list[Ranked], FusionWeights | None]:
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
        if (
            threshold is not None
            and threshold.kind != "rerank"
            and not (threshold.kind == "dense" and run.mode == "lexical")
        ):
            ranked = _above(run, ranked)
        return ranked, weights

    async def _reranked(self, run: Run, ranked: list[Ranked], reader: Reader) -> list[Ranked]:
        """Return the last order, above a threshold on its score; the fused order when the reranker cannot help in time."""
        first = ranked[: run.request.rerank_candidates or self._options.rerank_candidates]
        documents = await reader.read(first, "fetch")
        there = [entry for entry in first if entry.candidate.id in documents]
        texts = [model_text(d.title, d.text) for d in (documents[entry.candidate.id] for entry in there)]
        scores = await self._scores(run, texts) if texts else []
        if not any(score is not None for score in scores):
            return ranked
        run.reranked = sum(score is not None for score in scores)
        last = blend([*there, *ranked[len(first) :]], scores, weight=self._options.rerank_blend)
        threshold = run.request.min_score
        return _above(run, last) if threshold is not None and threshold.kind == "rerank" else last

    async def _scores(self, run: Run, texts: Sequence[str]) -> Sequence[float | None]:
        """Return what the reranker made of *texts* in time; nothing, with the reason noted, if it made nothing."""
        assert run.request.query is not None, "the caller saw to it"
        try:
            with run.timed("rerank"):
                scored = await self._rerank.rerank(run.request.query, texts, run.deadline.earlier(FINISH_S))
        except DeadlineExceeded:
            run.degrade("rerank_late")
            return []
        except TercetError:  # Down, overloaded, or it refuses a query that retrieval could read.
            run.degrade("rerank_unavailable")
            return []
        judged = sum(score is not None for score in scored.scores)
        if judged == 0:
            run.degrade("rerank_late")
            return []
        if judged < len(texts):
            run.degrade("rerank_partial")
        run.reranked_by = scored.model
        return scored.scores


def _understood(run: Run) -> tuple[Any, Vector | None]:
    """Return the parsed filter and the caller's own vector. Raises InvalidInput for what the collection cannot answer."""
    request, collection = run.request, run.collection
    for name in request.facets:
        kind_of(name, collection.attributes, f"facets.{name}")
    condition = parse_filter(request.filter, collection.attributes)
    if request.query_vector is not None:
        return condition, own_vector(request.query_vector, collection.dim, collection.metric, "query_vector")
    if request.mode != "lexical" and collection.fingerprint == OWN_VECTORS:
        raise InvalidInput(
            "query_vector: is required, since this collection has no model, or mode: lexical", param="query_vector"
        )
    return condition, None


def _above(run: Run, ranked: list[Ranked]) -> list[Ranked]:
    """Return what reaches the request's threshold, counting what does not."""
    assert run.request.min_score is not None, "the caller saw to it"
    kept = at_least(ranked, run.request.min_score.kind, run.request.min_score.value)
    run.below_min_score += len(ranked) - len(kept)
    return kept
