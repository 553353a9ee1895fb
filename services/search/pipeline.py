"""
The read path: which answer a search gets. One that was kept and is true still, one that is made, or in need an older one.

An answer is made by the stages (`stages.py`), each with a step down where it fails; `degraded` names every step.
"""

from collections.abc import Callable, Mapping
from typing import Any

from services.common.admission import Admission, Admitted
from services.common.deadline import Deadline
from services.common.errors import (
    DeadlineExceeded,
    DependencyUnavailable,
    InvalidInput,
    Overloaded,
    TercetError,
    Unavailable,
)
from services.common.wire.search import AdmissionExplanation, Priority, SearchReply, SearchRequest
from services.search.answer import Answer
from services.search.answering import Reader, choose, compose, write_hits
from services.search.budget import Budget
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.documents import own_vector
from services.search.effort import reranking_cost, retrieval_cost
from services.search.filters import parse_filter
from services.search.kept_answers import KeptAnswers, Look
from services.search.kinds import kind_of
from services.search.ladder import RETRY_AFTER_S, forbidden, is_refusal
from services.search.ports import EmbeddingClient, Highlighter, Ledger, RerankClient, Retrieved, Retriever, Vector
from services.search.quality import NOT_WATCHED, Finished, Watch
from services.search.run import Run
from services.search.stages import PipelineOptions, Stages, reranks

WAIT_SHARE = 0.5  # Of its time a search waits for the operation that its caller wants to see.


class SearchPipeline:
    """Answers questions over the catalog's collections."""

    def __init__(
        self,
        catalog: Catalog,
        ledger: Ledger,
        retriever: Retriever,
        embedding: EmbeddingClient,
        rerank: RerankClient,
        kept: KeptAnswers,
        options: PipelineOptions,
        *,
        admission: Admission,
        highlighter: Highlighter,
        watch: Watch = NOT_WATCHED,
        breakers: Callable[[], Mapping[str, str]] = dict,
        patience_s: float = 1.0,
    ) -> None:
        """
        Take the parts; *breakers* returns the state of each dependency's, by its name, for explanations.

        *patience_s* is how long embedding and reranking are waited for though they usually take less; see `Budget`.
        """
        self._catalog = catalog
        self._ledger = ledger
        self._retriever = retriever
        self._stages = Stages(retriever, embedding, rerank, options, Budget(patience_s=patience_s))
        self._kept = kept
        self._admission = admission
        self._options = options
        self._highlighter = highlighter
        self._watch = watch
        self._breakers = breakers

    async def search(
        self,
        request: SearchRequest,
        deadline: Deadline,
        *,
        request_id: str | None = None,
        priority: Priority = "normal",
        tenant: str = "",
        embedded: Mapping[str, Vector] | None = None,
    ) -> SearchReply:
        """Return `answer`'s reply."""
        found = await self.answer(
            request, deadline, request_id=request_id, priority=priority, tenant=tenant, embedded=embedded
        )
        return found.reply()

    async def answer(
        self,
        request: SearchRequest,
        deadline: Deadline,
        *,
        request_id: str | None = None,
        priority: Priority = "normal",
        tenant: str = "",
        embedded: Mapping[str, Vector] | None = None,
    ) -> Answer:
        """
        Answer *request* before *deadline*, stepping down where a part fails; `degraded` names each step.

        *tenant* is whose search it is, whose answers are kept apart; *embedded* has vectors of questions that are known
        already. The ledger's database is asked only for a `min_seq` that this process has not heard of, and for the
        watermark of a kept answer where other processes write too. Cancelling ends all that runs for this caller alone.

        Raises:
            NotFound: There is no such collection.
            InvalidInput: The filter, a facet or the vector is wrong for the collection.
            Conflict: The embedding service's model is not the collection's.
            DependencyUnavailable, DeadlineExceeded: No shard answered, or the request forbids the step down that is left.
            Overloaded: There is too much to do; any of these three only where no older answer may be served.
        """
        collection = await self._catalog.get(request.collection)
        run = Run(request, collection, deadline, self._watch.stage, request.mode, tenant, request_id)
        run.timeout_ms = round(deadline.remaining_s() * 1000, 3)
        condition, vector = _understood(run)
        run.seq, run.epoch = self._ledger.heard_seq(collection.uuid), self._ledger.epoch
        if vector is None and embedded is not None and request.query is not None:
            vector = embedded.get(request.query)
        look = await self._kept.look(run)
        if look.fresh is not None:
            return look.fresh.addressed(request_id, {"total": run.elapsed_ms()})
        if request.explain:
            run.cache = look.explanation
        try:
            made = await self._kept.once(run, look, lambda: self._make(run, condition, vector, priority))
        except (Unavailable, DeadlineExceeded, Overloaded) as error:
            return self._older(run, look, error)
        return made.addressed(request_id, {"total": run.elapsed_ms(), **run.timings_ms})

    def _older(self, run: Run, look: Look, error: TercetError) -> Answer:
        """Return the last good answer, flagged, since *error* left none to be made; raise that where it may not be."""
        if look.spare is None or is_refusal(error) or forbidden(run.request.require, "stale") is not None:
            self._watch.failed(run, error)
            raise error
        run.degraded = ["stale"]
        self._kept.note_stale()
        answer = look.spare.addressed(run.request_id, {"total": run.elapsed_ms()})
        self._watch.finished(Finished(run, None, None, (), (), answer.reply()))
        return answer

    async def _make(self, run: Run, condition: Any, vector: Vector | None, priority: Priority) -> SearchReply:
        """Return the reply that the stages make now, once there is room for it. Raises as `answer` does."""
        await self._wait_for(run)
        request, options = run.request, self._options
        first = retrieval_cost(request, candidates=request.candidates or options.candidates)
        last = reranking_cost(request, candidates=request.rerank_candidates or options.rerank_candidates)
        async with self._admission.enter(first + last, priority, run.deadline, first=first) as admitted:
            if request.explain:
                run.admission = self._admission_now(admitted)
            return await self._run(run, condition, vector, admitted)

    async def _run(self, run: Run, condition: Any, vector: Vector | None, admitted: Admitted) -> SearchReply:
        stages, request = self._stages, run.request
        if vector is None and request.mode != "lexical":
            vector = await stages.embed(run)
        query, retrieved = await stages.retrieve(run, vector, condition)
        with run.timed("fuse"):
            ranked, weights = stages.fuse(run, retrieved)
        reader = Reader(run, self._retriever)
        last = ranked
        if ranked and reranks(run):
            admitted.charge()
            last = await stages.rerank(run, ranked, reader, admitted.pressure)
        timed = run.timed("hits")
        with timed:
            page = await choose(run, last, reader)
            hits = await write_hits(run, page, reader, self._highlighter, retrieved.terms)
        stages.note_hits(timed.seconds)
        self._mind_the_lost(run, retrieved, reader, found=bool(hits) or not page)
        run.timings_ms["total"] = run.elapsed_ms()
        self._watch.stage("total", run.timings_ms["total"] / 1000)
        breakers = self._breakers() if request.explain else {}
        reply = compose(run, hits, retrieved, weights, breakers)
        fused = [entry.candidate.id for entry in ranked]
        order = [entry.candidate.id for entry in last] if run.reranked else []
        self._watch.finished(Finished(run, query, retrieved, fused, order, reply))
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
            if not await self._retriever.wait_applied(run.collection, min_seq, run.patience(WAIT_SHARE)):
                run.degrade("catching_up")
        run.seq = max(run.seq, min_seq)

    def _mind_the_lost(self, run: Run, retrieved: Retrieved, reader: Reader, *, found: bool) -> None:
        """
        Flag the shards that found candidates and then could not be read.

        A document that is missing may have been deleted since; where nothing was written since, it was not.

        Raises:
            DependencyUnavailable, DeadlineExceeded: They could not be asked, or not in time, and so nothing was *found*.
        """
        if reader.lost and self._ledger.heard_seq(run.collection.uuid) <= retrieved.as_of:
            run.unread = frozenset(reader.lost)
            if not found and reader.failed:
                if reader.failed <= reader.late:
                    raise DeadlineExceeded(
                        "The time allowed for this request ran out before what was found could be read"
                    )
                raise DependencyUnavailable("What was found cannot be read now", retry_after_s=RETRY_AFTER_S)
            run.degrade("shards_partial")

    def _admission_now(self, admitted: Admitted) -> AdmissionExplanation:
        return AdmissionExplanation(
            in_flight=round(self._admission.in_flight, 3),
            limit=round(self._admission.limit, 3),
            waited_ms=round(admitted.waited_s * 1000, 3),
            pressure=round(admitted.pressure, 3),
        )


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
