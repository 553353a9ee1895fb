"""Many searches at once: each answered or refused by itself, while they share what they have in common."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import structlog

from services.common.deadline import Deadline
from services.common.errors import TercetError
from services.common.tracing import span
from services.common.wire.search import Priority, SearchRequest
from services.search.answer import Answer
from services.search.catalog import OWN_VECTORS, Catalog
from services.search.pipeline import SearchPipeline
from services.search.ports import Collection, EmbeddingClient, Vector

AT_ONCE = 8
TOGETHER = 64  # Searches of a stream that share what they have in common.
EMBED_SHARE = 0.5  # Of the longest time that a search allows: enough is left for those that then go on without.

Asked = SearchRequest | TercetError
Outcome = Answer | Exception

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """
    Who asks, and what holds for all of his searches.

    *due* is asked when a search begins, so that waiting for its turn costs it none of its own time.
    """

    due: Callable[[SearchRequest], Deadline]
    request_id: str | None
    priority: Priority
    tenant: str = ""


class Batches:
    """
    Answers lists and streams of searches, up to eight of each at a time.

    Equal searches are made once, and the questions of a collection are embedded in one call, in the `bulk` lane. What this
    call cannot give, each search tries to get by itself.
    """

    def __init__(self, catalog: Catalog, embedding: EmbeddingClient, pipeline: SearchPipeline) -> None:
        self._catalog = catalog
        self._embedding = embedding
        self._pipeline = pipeline

    async def each(self, asked: Sequence[Asked], caller: Caller) -> list[Outcome]:
        """
        Return what each of *asked* came to, in their order: an answer, or why there is none; an error stays what it is.

        An exception that is no TercetError is one that nobody foresaw, and was logged. Cancelling cancels all of them.
        """
        firsts, first_of = _distinct(asked)
        searches = [asked[at] for at in firsts]
        vectors = await self._embed([one for one in searches if isinstance(one, SearchRequest)], caller.due)
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(search: Asked) -> Outcome:
            if isinstance(search, TercetError):
                return search
            async with turns:
                try:
                    return await self._pipeline.answer(
                        search,
                        caller.due(search),
                        request_id=caller.request_id,
                        priority=caller.priority,
                        tenant=caller.tenant,
                        embedded=vectors.get(search.collection),
                    )
                except TercetError as error:
                    return error
                except Exception as error:
                    _log.error("search_of_batch_failed", exc_info=error)
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = {at: group.create_task(one(search)) for at, search in zip(firsts, searches, strict=True)}
        return [tasks[first].result() for first in first_of]

    async def stream(self, asked: Iterable[Asked], caller: Caller) -> AsyncIterator[Outcome]:
        """Yield what each of *asked* came to, in their order; they are taken 64 at a time, as the outcomes are. See `each`."""
        source = iter(asked)
        while together := list(islice(source, TOGETHER)):
            for outcome in await self.each(together, caller):
                yield outcome

    async def _embed(
        self, searches: Sequence[SearchRequest], due: Callable[[SearchRequest], Deadline]
    ) -> dict[str | None, Mapping[str, Vector]]:
        """Return the vectors of questions that several searches need, by the collection's name as it was given."""
        by_name: dict[str | None, dict[str, SearchRequest]] = {}
        for search in searches:
            if search.query is not None and search.query_vector is None and search.mode != "lexical":
                by_name.setdefault(search.collection, {})[search.query] = search
        made: dict[str | None, Mapping[str, Vector]] = {}
        for name, questions in by_name.items():
            if len(questions) > 1:
                until = max((due(search) for search in questions.values()), key=lambda deadline: deadline.at)
                made[name] = await self._embed_for(name, list(questions), until)
        return made

    async def _embed_for(self, name: str | None, texts: Sequence[str], until: Deadline) -> Mapping[str, Vector]:
        """Return the vectors of *texts* for one collection; none where that fails: the searches will say why."""
        try:
            collection: Collection = await self._catalog.get(name)
            if collection.fingerprint == OWN_VECTORS:
                return {}
            patience = until.at_most(until.remaining_s() * EMBED_SHARE)
            with span("search.embed_batch"):
                made = await self._embedding.embed_queries(texts, patience, model=collection.model)
        except TercetError as error:
            _log.info("batch_not_embedded", collection=name, code=error.code)
            return {}
        if made.model.fingerprint != collection.fingerprint:
            return {}
        return dict(zip(texts, made.vectors, strict=True))


def _distinct(asked: Sequence[Asked]) -> tuple[list[int], list[int]]:
    """Return the places of the first of equal searches, and for each of *asked* the place of the first that equals it."""
    known: dict[tuple[str | None, str | None], list[int]] = {}
    firsts: list[int] = []
    first_of: list[int] = []
    for at, search in enumerate(asked):
        alike: list[int] = []
        if isinstance(search, SearchRequest):
            alike = known.setdefault((search.query, search.collection), [])
        first = next((other for other in alike if asked[other] == search), at)
        if first == at:
            firsts.append(at)
            alike.append(at)
        first_of.append(first)
    return firsts, first_of
