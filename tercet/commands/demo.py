"""The demo collection: indexed once for `tercet up --demo`, and scored by `tercet demo-eval`."""

import asyncio
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from services.common.wire.collections import CollectionReply
from services.common.wire.search import SearchReply
from tercet.client import IndexSummary, TercetClient
from tercet.commands import DEFAULT_DATA_DIR, ApiKey, DataDir, Url, reachable_stack
from tercet.console import ProgressLine, say, say_reply, say_table, warn
from tercet.demo.corpus import demo_documents
from tercet.demo.questions import Question, load_questions, reciprocal_rank
from tercet.evaluation import MODES
from tercet.ingest import DocumentDict

COLLECTION = "demo"
QUESTION = "run a coroutine with a timeout"
ENVIRON = {"SEARCH_DEFAULT_COLLECTION": COLLECTION}
_ANSWERS = frozenset({"asyncio.wait_for", "asyncio.timeout"})
_BATCH_SIZE = 64
_MARKER_FILE = "demo.json"
_GENEROUS_TIMEOUT_MS = 60_000


class DemoError(Exception):
    """There is no demo collection to work with; the message says how to get one."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What a demo collection was made of: *documents* is how many it has once it is complete."""

    python: str
    model: str
    uuid: str
    documents: int | None = None


class Demo:
    """The demo collection of the stack on *data_dir*, which embeds with *model* (its setting, empty for the default)."""

    def __init__(self, client: TercetClient, data_dir: Path, *, model: str, started: float) -> None:
        self._client = client
        self._marker_file = data_dir / _MARKER_FILE
        self._python = platform.python_version()
        self._model = model
        self._started = started

    async def show(self) -> None:
        """
        Index the corpus unless that was done before, and print an answered question as soon as there is an answer.

        When indexing, it is asked again over the whole corpus.
        """
        if await self._is_complete():
            await self.ask(f"answer after {self._elapsed()}")
            return
        await self.fill(ask_early=True)
        say(f"\nthe whole corpus was indexed after {self._elapsed()}", "bold green")
        await self.ask("the same question over the whole corpus")

    async def fill(self, *, ask_early: bool = False) -> None:
        """Index the corpus, unless that was done before."""
        if await self._is_complete():
            return
        documents = await asyncio.to_thread(lambda: list(demo_documents()))
        collection = await self._collection()
        marker = Marker(self._python, self._model, collection.uuid)
        self._write_marker(marker)
        early: asyncio.Task[None] | None = None
        enough = _enough_for_an_answer(documents) if ask_early else len(documents) + 1

        def on_batch(total: IndexSummary) -> None:
            nonlocal early
            progress.update(total.documents)
            if early is None and total.documents >= enough:
                early = asyncio.create_task(self._ask_early(total.documents))

        try:
            with ProgressLine("indexing the documentation of Python", unit="texts", total=len(documents)) as progress:
                await self._client.index(COLLECTION, documents, batch_size=_BATCH_SIZE, on_batch=on_batch)
                if early is not None:
                    await early
        finally:
            if early is not None:
                early.cancel()
        indexed = (await self._client.collection(COLLECTION)).documents
        self._write_marker(replace(marker, documents=indexed))

    async def ask(self, headline: str) -> None:
        """Put the demo's question and print the answer under *headline*."""
        reply = await self._client.search(
            query=QUESTION, collection=COLLECTION, k=3, cache=False, timeout_ms=_GENEROUS_TIMEOUT_MS
        )
        say(f"\n“{QUESTION}”: {headline}", "bold")
        say_reply(reply)

    async def _ask_early(self, indexed: int) -> None:
        await self.ask(f"first answer after {self._elapsed()}, with {indexed} documents indexed so far")
        say("")

    async def _is_complete(self) -> bool:
        marker = self._read_marker()
        if marker is None or marker.documents is None or (marker.python, marker.model) != (self._python, self._model):
            return False
        collection = await self._client.find_collection(COLLECTION)
        return collection is not None and (collection.uuid, collection.documents) == (marker.uuid, marker.documents)

    async def _collection(self) -> CollectionReply:
        """Return the collection to write to; one made of another Python or by another model gives way to a new one."""
        marker = self._read_marker()
        found = await self._client.find_collection(COLLECTION)
        if found is not None and marker is not None and marker.uuid == found.uuid:
            if (marker.python, marker.model) == (self._python, self._model):
                return found
            await self._client.delete_collection(COLLECTION)
            found = None
        return found or await self._client.create_collection(COLLECTION)

    def _read_marker(self) -> Marker | None:
        try:
            return Marker(**json.loads(self._marker_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _write_marker(self, marker: Marker) -> None:
        temporary = self._marker_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(marker)) + "\n")
        temporary.replace(self._marker_file)

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._started:.1f} s"


def _enough_for_an_answer(documents: Sequence[DocumentDict]) -> int:
    """Return after how many documents the question can be answered, with a batch to spare as two are under way."""
    needed = [place for place, document in enumerate(documents) if document["id"].partition("#")[0] in _ANSWERS]
    return min(max(needed, default=0) + 1 + _BATCH_SIZE, len(documents))


def demo_eval(url: Url = None, api_key: ApiKey = None, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Score the demo's twenty questions by mode; starts a stack and indexes the corpus if need be."""
    asyncio.run(_demo_eval(url, api_key, data_dir))


async def _demo_eval(url: str | None, api_key: str | None, data_dir: Path) -> None:
    started = time.monotonic()
    stack = reachable_stack(url, data_dir, api_key=api_key, temporary_dir=data_dir, environ=ENVIRON)
    async with stack as (client, is_temporary):
        if is_temporary:
            model = os.environ.get("EMBEDDING_MODEL", "")
            await Demo(client, data_dir, model=model, started=started).fill()
        collection = await client.find_collection(COLLECTION)
        if collection is None:
            raise DemoError(f"{client.base_url} has no {COLLECTION!r} collection; `tercet up --demo` makes one")
        questions = load_questions()
        say(f"{len(questions)} questions over {collection.documents} documents")
        with ProgressLine("asking", unit="questions", total=len(questions) * len(MODES)) as progress:
            counter = itertools.count(1)
            outcomes = {
                mode: await _score(client, mode, questions, lambda: progress.update(next(counter))) for mode in MODES
            }
    _say_outcomes(outcomes, questions)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One mode's reciprocal rank for each question, its time, and how many answers were degraded."""

    ranks: dict[str, float]
    ms: float
    degraded: int

    @property
    def missed(self) -> list[str]:
        return [id_ for id_, rank in self.ranks.items() if rank == 0]


async def _score(
    client: TercetClient, mode: str, questions: Sequence[Question], on_answer: Callable[[], None]
) -> _Outcome:
    ranks, degraded, seconds = {}, 0, 0.0
    for question in questions:
        asked = time.monotonic()
        reply: SearchReply = await client.search(
            query=question.query,
            collection=COLLECTION,
            k=10,
            include=[],
            cache=False,
            timeout_ms=_GENEROUS_TIMEOUT_MS,
            **MODES[mode],
        )
        seconds += time.monotonic() - asked
        degraded += bool(reply.degraded)
        ranks[question.id] = reciprocal_rank([hit.id for hit in reply.hits], question.answers)
        on_answer()
    return _Outcome(ranks, 1000 * seconds / len(questions), degraded)


def _say_outcomes(outcomes: dict[str, _Outcome], questions: Sequence[Question]) -> None:
    table = Table("mode")
    for name in ("MRR@10", "missed", "ms/question"):
        table.add_column(name, justify="right")
    for mode, outcome in outcomes.items():
        mrr = sum(outcome.ranks.values()) / len(questions)
        table.add_row(mode, f"{mrr:.3f}", str(len(outcome.missed)), f"{outcome.ms:.0f}")
    say_table(table)
    for question in questions:
        modes = [mode for mode, outcome in outcomes.items() if question.id in outcome.missed]
        if modes:
            say(f"  {question.id} “{question.query}” missed by {', '.join(modes)}")
    degraded = sum(outcome.degraded for outcome in outcomes.values())
    if degraded:
        warn(f"{degraded} answers were degraded: these figures are not what the stack can do")
