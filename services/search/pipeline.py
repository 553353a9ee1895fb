"""The read path: cache → embed → retrieve → fuse → rerank, with a step down, and its name in the reply, for each failure."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field

import orjson

from services.common.deadline import Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput, TercetError
from services.common.tracing import span
from services.common.wire.search import (
    CacheReply,
    Coverage,
    Degradation,
    Hit,
    Mode,
    PipelineReply,
    SearchReply,
    SearchRequest,
    ShardCoverage,
    ShardFailure,
    StageScores,
)
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.documents import model_text
from services.search.filters import parse_filter
from services.search.fusion import Ranked, blend, bm25_ceiling, fuse
from services.search.indexing import check_fingerprint, unit_vector
from services.search.ports import (
    CacheEntry,
    Collection,
    EmbeddingClient,
    Ledger,
    RerankClient,
    ResultCache,
    RetrievalQuery,
    Retrieved,
    Retriever,
    ShardDocument,
    Vector,
)

# Shares of the time that is left: a stage that uses all of its own leaves enough for the step down after it.
EMBED_SHARE = 0.5
RETRIEVE_SHARE = 0.8
FINISH_S = 0.03  # Kept back after reranking to fetch and write the hits.

Observe = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """The settings that the pipeline uses; a request may override the candidates."""

    candidates: int
    rerank_candidates: int
    dense_weight: float
    rerank_blend: float


@dataclass(slots=True)
class _Run:
    """One search under way: what was found out so far."""

    request: SearchRequest
    collection: Collection
    deadline: Deadline
    observe: Observe
    degraded: list[Degradation] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    mode: Mode = "hybrid"
    reranked_by: str | None = None

    def degrade(self, reason: Degradation) -> None:
        if reason not in self.degraded:
            self.degraded.append(reason)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with span(f"search.{stage}"):
                yield
        finally:
            seconds = time.perf_counter() - started
            self.timings_ms[stage] = round(seconds * 1000, 3)
            self.observe(stage, seconds)


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
        observe: Observe = lambda _stage, _seconds: None,
    ) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._embedding = embedding
        self._rerank = rerank
        self._cache = cache
        self._options = options
        self._observe = observe

    async def search(self, request: SearchRequest, deadline: Deadline, *, request_id: str | None = None) -> SearchReply:
        """
        Answer *request* before *deadline*, stepping down where a part fails; `degraded` names each step.

        Raises:
            NotFound: There is no such collection.
            InvalidInput: The filter or the vector is wrong for the collection.
            Conflict: The embedding service's model is not the collection's.
            DependencyUnavailable, DeadlineExceeded: No shard answered.
        """
        started = time.perf_counter()
        collection = await self._catalog.get(request.collection)
        run = _Run(request, collection, deadline, self._observe, mode=request.mode)
        condition = parse_filter(request.filter)
        vector = None
        if request.query_vector is not None:
            vector = unit_vector(request.query_vector, collection.dim, "query_vector")
        elif request.mode != "lexical" and collection.fingerprint == OWN_VECTORS:
            raise InvalidInput(
                "query_vector: is required, since this collection has no model, or mode: lexical", param="query_vector"
            )
        state = await self._ledger.state(collection.uuid)
        await self._wait_for(run, state.seq)
        key = _cache_key(collection, request, self._options)
        if request.cache:
            cached = await self._from_cache(run, key, state.seq)
            if cached is not None:
                cached_ms = round((time.perf_counter() - started) * 1000, 3)
                return cached.model_copy(update={"request_id": request_id, "timings_ms": {"total": cached_ms}})
        if vector is None and request.mode != "lexical":
            vector = await self._embed(run)
        retrieved = await self._retrieve(run, vector, condition)
        ranked = fuse(
            retrieved.candidates,
            method=request.fusion,
            dense_weight=self._options.dense_weight,
            ceiling=bm25_ceiling(retrieved.terms, retrieved.statistics),
        )
        documents: dict[str, ShardDocument] = {}
        if request.rerank and request.query is not None and ranked:
            ranked, documents = await self._reranked(run, ranked)
        hits = await self._hits(run, ranked, documents)
        total = time.perf_counter() - started
        self._observe("total", total)
        run.timings_ms["total"] = round(total * 1000, 3)
        reply = _reply(run, hits, retrieved, request_id)
        if request.cache and not run.degraded and retrieved.as_of >= state.seq:
            body = orjson.dumps(reply.model_dump(exclude_none=True))
            await self._cache.put(key, CacheEntry(retrieved.as_of, time.time(), body))
        return reply

    async def _wait_for(self, run: _Run, ledger_seq: int) -> None:
        """Wait for the operation the caller wants to see; the time it takes comes out of the search's own."""
        if run.request.min_seq is None:
            return
        if run.request.min_seq > ledger_seq:
            raise InvalidInput(
                f"min_seq: {run.request.min_seq} is after the last operation, {ledger_seq}", param="min_seq"
            )
        patience = run.deadline.at_most(run.deadline.remaining_s() * EMBED_SHARE)
        with run.timed("wait"):
            if not await self._retriever.wait_applied(run.collection, run.request.min_seq, patience):
                run.degrade("catching_up")

    async def _from_cache(self, run: _Run, key: str, ledger_seq: int) -> SearchReply | None:
        with run.timed("cache"):
            entry = await self._cache.get(key)
        if not self._cache.available:
            run.degrade("cache_unavailable")
        if entry is None or entry.as_of < ledger_seq:
            return None
        try:
            reply = SearchReply.model_validate(orjson.loads(entry.body))
        except ValueError:  # Another version of this program wrote it.
            return None
        age_ms = max(0, int((time.time() - entry.created_at) * 1000))
        return reply.model_copy(update={"cache": CacheReply(hit=True, age_ms=age_ms)})

    async def _embed(self, run: _Run) -> Vector | None:
        """Return the query's vector, or None, the mode now lexical, when the embedding service cannot give it in time."""
        assert run.request.query is not None, "the request's validation demands a query here"
        try:
            with run.timed("embed"):
                patience = run.deadline.at_most(run.deadline.remaining_s() * EMBED_SHARE)
                made = await self._embedding.embed_query(run.request.query, patience)
        except DeadlineExceeded:
            run.degrade("embedding_late")
        except TercetError:
            run.degrade("embedding_unavailable")
        else:
            check_fingerprint(run.collection, made.model.fingerprint)
            row: Vector = made.vectors[0]
            return row
        run.mode = "lexical"
        return None

    async def _retrieve(self, run: _Run, vector: Vector | None, condition: object) -> Retrieved:
        request = run.request
        query = RetrievalQuery(
            limit=max(request.candidates or self._options.candidates, request.offset + request.k),
            vector=vector if run.mode != "lexical" else None,
            text=request.query if run.mode != "dense" else None,
            filter=condition,
        )
        with run.timed("retrieve"):
            patience = run.deadline.at_most(run.deadline.remaining_s() * RETRIEVE_SHARE)
            retrieved = await self._retriever.retrieve(run.collection, query, patience)
        run.timings_ms |= {stage: round(ms, 3) for stage, ms in retrieved.timings_ms.items()}
        if retrieved.ok == 0 and retrieved.total > 0:
            if retrieved.timed_out:
                raise DeadlineExceeded("The time allowed for this request ran out before any shard answered")
            raise DependencyUnavailable("No shard of the collection can answer now", retry_after_s=1.0)
        if retrieved.ok < retrieved.total or retrieved.failures:
            run.degrade("shards_partial")
        if retrieved.catching_up:
            run.degrade("catching_up")
        return retrieved

    async def _reranked(self, run: _Run, ranked: list[Ranked]) -> tuple[list[Ranked], dict[str, ShardDocument]]:
        """Return the last order and the documents read on the way; the fused order when the reranker cannot help in time."""
        first = ranked[: run.request.rerank_candidates or self._options.rerank_candidates]
        with run.timed("fetch"):
            candidates = [entry.candidate for entry in first]
            documents = await self._retriever.fetch(run.collection, candidates, run.deadline)
        there = [entry for entry in first if entry.candidate.id in documents]
        texts = [model_text(d.title, d.text) for d in (documents[entry.candidate.id] for entry in there)]
        scores = await self._scores(run, texts) if texts else []
        if not any(score is not None for score in scores):
            return ranked, documents
        return blend([*there, *ranked[len(first) :]], scores, weight=self._options.rerank_blend), documents

    async def _scores(self, run: _Run, texts: Sequence[str]) -> Sequence[float | None]:
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

    async def _hits(self, run: _Run, ranked: Sequence[Ranked], documents: dict[str, ShardDocument]) -> list[Hit]:
        include = run.request.include
        page = ranked[run.request.offset : run.request.offset + run.request.k]
        missing = [entry.candidate for entry in page if "vector" in include or entry.candidate.id not in documents]
        if missing:
            with run.timed("fetch_hits"):
                fetched = await self._retriever.fetch(
                    run.collection, missing, run.deadline, vectors="vector" in include
                )
            documents = {**documents, **fetched}
        hits = []
        for entry in page:
            document = documents.get(entry.candidate.id)
            if document is None:  # Replaced or deleted since it was found.
                continue
            hits.append(
                Hit(
                    id=document.id,
                    score=round(entry.score, 6),
                    score_kind=entry.score_kind,
                    title=document.title,
                    text=document.text if "text" in include else None,
                    metadata=dict(document.metadata) if "metadata" in include else None,
                    vector=document.vector.tolist() if document.vector is not None and "vector" in include else None,
                    stages=_stages(entry),
                )
            )
        return hits


def _stages(entry: Ranked) -> StageScores:
    def rounded(score: float | None) -> float | None:
        return None if score is None else round(score, 6)

    return StageScores(
        dense=rounded(entry.candidate.dense),
        bm25=rounded(entry.candidate.bm25),
        fused=rounded(entry.fused),
        rerank=rounded(entry.rerank),
    )


def _reply(run: _Run, hits: list[Hit], retrieved: Retrieved, request_id: str | None) -> SearchReply:
    return SearchReply(
        collection=run.collection.name,
        hits=hits,
        coverage=Coverage(
            ratio=round(retrieved.ok / retrieved.total, 4) if retrieved.total else 1.0,
            shards=ShardCoverage(
                total=retrieved.total,
                ok=retrieved.ok,
                timed_out=retrieved.timed_out,
                failed=len(retrieved.failures),
                catching_up=retrieved.catching_up,
            ),
            failures=[ShardFailure(shard=shard, reason=reason) for shard, reason in retrieved.failures.items()],
        ),
        degraded=run.degraded,
        pipeline=PipelineReply(retrieval=run.mode, rerank=run.reranked_by),
        cache=CacheReply(hit=False),
        as_of=retrieved.as_of,
        timings_ms=run.timings_ms,
        request_id=request_id,
    )


def _cache_key(collection: Collection, request: SearchRequest, options: PipelineOptions) -> str:
    """Identify all that decides the answer but the collection's contents, which the entry's `as_of` stands for."""
    asked = request.model_dump(exclude={"collection", "timeout_ms", "min_seq", "cache"})
    asked["include"] = sorted(asked["include"])
    parts = [collection.uuid, collection.fingerprint, asked, astuple(options)]
    return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=20).hexdigest()
