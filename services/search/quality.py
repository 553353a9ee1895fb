"""
What finished searches tell of the quality of answers: who is told of them, and two measures taken on live questions.

Recall is measured by asking a sampled share of the questions again, exactly and in the background; agreement compares the
order before reranking with the one after it.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import structlog

from services.common.deadline import Deadline
from services.common.errors import TercetError
from services.common.wire.search import SearchReply
from services.search.ports import Candidate, Collection, RetrievalQuery, Retrieved, Retriever
from services.search.run import Run

AT = 10  # Both measures look at the first ten.
TOLERANCE = 1e-5  # Scores of equal documents differ by the order in which a sum is taken.
EXACT_PATIENCE_S = 5.0
REST = 20  # After an exact search come so many times its own duration without one: at most 5 % of one thread.

Sample = Literal["measured", "moved", "failed", "skipped"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """
    One search that the pipeline answered, and what it was made of.

    *query* and *retrieved* are None where nothing could be retrieved and an older answer was served. *fused* and *last* are
    the ids of the candidates in the order before and after reranking; *last* is empty where nothing was reranked.
    """

    run: Run
    query: RetrievalQuery | None
    retrieved: Retrieved | None
    fused: Sequence[str]
    last: Sequence[str]
    reply: SearchReply


class Watch(Protocol):
    """Is told how searches go. Its methods return at once and never raise."""

    def stage(self, stage: str, seconds: float) -> None:
        """Note how long a stage took."""
        ...

    def finished(self, finished: Finished) -> None:
        """Look at a search that the pipeline ran; those that the result cache answered are not told of."""
        ...

    def failed(self, run: Run, error: TercetError) -> None:
        """Look at a search that *error* left without an answer."""
        ...


class Watched:
    """Tells each of several observers of every finished search, and one of those that failed, whatever another of them does."""

    def __init__(
        self,
        observers: Sequence[Callable[[Finished], None]] = (),
        *,
        note_stage: Callable[[str, float], None] = lambda _stage, _seconds: None,
        note_failed: Callable[[Run, TercetError], None] = lambda _run, _error: None,
    ) -> None:
        self._observers = tuple(observers)
        self._note_failed = note_failed
        self._note_stage = note_stage

    def stage(self, stage: str, seconds: float) -> None:
        """See Watch."""
        self._note_stage(stage, seconds)

    def finished(self, finished: Finished) -> None:
        """See Watch."""
        for observe in self._observers:
            _safely(partial(observe, finished))

    def failed(self, run: Run, error: TercetError) -> None:
        """See Watch."""
        _safely(partial(self._note_failed, run, error))


def _safely(tell: Callable[[], None]) -> None:
    try:
        tell()
    except Exception as error:
        _log.error("watching_failed", exc_info=error)


NOT_WATCHED: Watch = Watched()


def recall_at(found: Sequence[Candidate], exact: Sequence[Candidate], depth: int = AT) -> float | None:
    """
    Return the share of the *depth* nearest, of which *exact* has all, that are among *found*; None where there are none.

    Documents as near as the last of them stand for each other.
    """
    nearest = sorted((one.dense for one in exact if one.dense is not None), reverse=True)[:depth]
    if not nearest:
        return None
    as_near = nearest[-1] - TOLERANCE * max(1.0, abs(nearest[-1]))
    there = sum(one.dense is not None and one.dense >= as_near for one in found)
    return min(there, len(nearest)) / len(nearest)


def agreement(before: Sequence[str], after: Sequence[str], depth: int = AT) -> float | None:
    """Return the share of the first *depth* of *before* that are in those of *after*; None for lists that are not longer."""
    if len(before) <= depth or len(after) <= depth:
        return None
    return len(set(before[:depth]) & set(after[:depth])) / depth


class ShadowSearch:
    """
    Measures the recall of live questions: a share *ratio* of them is asked again, exactly, in the background.

    One at a time, and never while the service is under *pressure* (0 to 1). A sample counts only if both searches saw the
    same operations and all shards by their own indexes; *report* is told the recall, *note* what became of each sample.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        ratio: float,
        report: Callable[[float], None],
        note: Callable[[Sample], None] = lambda _sample: None,
        pressure: Callable[[], float] = lambda: 0.0,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retriever = retriever
        self._ratio = ratio
        self._report = report
        self._note = note
        self._pressure = pressure
        self._draw = draw
        self._clock = clock
        self._not_before = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def finished(self, finished: Finished) -> None:
        """Ask the question again if it is drawn, has a vector, and was answered approximately by all shards."""
        query, retrieved = finished.query, finished.retrieved
        if query is None or retrieved is None or query.vector is None or query.exact:
            return
        if retrieved.ok < retrieved.total or retrieved.fallback or self._draw() >= self._ratio:
            return
        busy = self._task is not None and not self._task.done()
        if busy or self._clock() < self._not_before or self._pressure() > 0:
            self._note("skipped")
            return
        exact = replace(query, limit=AT, text=None, exact=True, explain=False, facets={})
        measuring = self._measure(finished.run.collection, exact, retrieved)
        # In a context of its own: it belongs to no request's trace.
        self._task = asyncio.get_running_loop().create_task(measuring, context=Context())

    async def _measure(self, collection: Collection, query: RetrievalQuery, retrieved: Retrieved) -> None:
        began = self._clock()
        try:
            exact = await self._retriever.retrieve(collection, query, Deadline.after(EXACT_PATIENCE_S))
        except Exception as error:
            _log.warning("exact_search_failed", collection=collection.name, error=repr(error))
            self._note("failed")
            return
        finally:
            ended = self._clock()
            self._not_before = ended + REST * (ended - began)
        if exact.ok < exact.total or exact.fallback:
            self._note("failed")
            return
        recall = recall_at(retrieved.candidates, exact.candidates)
        if exact.as_of != retrieved.as_of:
            self._note("moved")
        elif recall is not None:
            self._report(recall)
            self._note("measured")

    async def aclose(self) -> None:
        """Stop measuring."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
