"""The retriever over shards in this process, with shards that are dictionaries and fail on command."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import BackendFailed, InvalidInput, NotFound, NotReady, Unavailable
from services.search.ports import (
    Candidate,
    Collection,
    CollectionState,
    LedgerDocument,
    LexicalStatistics,
    Operation,
    RetrievalQuery,
    Retrieved,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
)
from services.search.shards import follower as follower_module
from services.search.shards.follower import PAGE, shard_of
from services.search.shards.router import LocalRetriever

BOOKS = Collection("uuid-books", "books", None, "fp", 2, 4, 0.0)
FILMS = Collection("uuid-films", "films", None, "fp", 2, 2, 0.0)


def make_document(id_: str, text: str) -> LedgerDocument:
    """Return a document with a vector that says how long its text is."""
    return LedgerDocument(id_, text, None, {}, np.array([1.0, len(text)], dtype=np.float32), b"", b"")


class MemoryLedger:
    """The parts of a ledger that a follower reads; *down* makes them raise."""

    def __init__(self, *collections: Collection) -> None:
        self.collections = list(collections)
        self.last: dict[str, dict[str, Operation]] = {collection.uuid: {} for collection in collections}
        self.seq: Counter[str] = Counter()
        self.down = False
        self.reads = 0

    def write(self, collection: Collection, **texts: str | None) -> int:
        """Append an operation for each of *texts*, a deletion where it is None; return the last number."""
        for id_, text in texts.items():
            self.seq[collection.uuid] += 1
            document = None if text is None else make_document(id_, text)
            log = self.last[collection.uuid]
            log.pop(id_, None)
            log[id_] = Operation(self.seq[collection.uuid], id_, document)
        return self.seq[collection.uuid]

    async def list_collections(self) -> list[Collection]:
        return self.collections

    async def state(self, uuid: str) -> CollectionState:
        self._check()
        if uuid not in self.last:
            raise NotFound("It was deleted")
        return CollectionState(self.seq[uuid], len(self.last[uuid]))

    async def operations_after(self, uuid: str, seq: int, *, limit: int) -> list[Operation]:
        self._check()
        self.reads += 1
        return [operation for operation in self.last[uuid].values() if operation.seq > seq][:limit]

    def _check(self) -> None:
        if self.down:
            raise Unavailable("The ledger is away")


@dataclass
class DictionaryShard:
    """A faithful shard: its rows only grow, an update is a new row. Set an `Event` to hold a method up."""

    number: int
    applied_seq: int = 0
    rows: list[LedgerDocument] = field(default_factory=list)
    live: dict[str, int] = field(default_factory=dict)
    applied_at: list[float] = field(default_factory=list)
    apply_error: Exception | None = None
    search_error: Exception | None = None
    statistics_error: Exception | None = None
    apply_gate: asyncio.Event | None = None
    search_gate: asyncio.Event | None = None
    searching: int = 0
    asked: ShardQuery | None = None
    closed: bool = False

    @property
    def documents(self) -> int:
        return len(self.live)

    async def apply(self, operations: Sequence[Operation], applied_seq: int) -> None:
        assert not self.closed
        self.applied_at.append(time.monotonic())
        if self.apply_gate:
            await self.apply_gate.wait()
        if self.apply_error:
            raise self.apply_error
        for operation in operations:
            assert self.applied_seq < operation.seq <= applied_seq
            self.live.pop(operation.id, None)
            if operation.document is not None:
                self.live[operation.id] = len(self.rows)
                self.rows.append(operation.document)
        self.applied_seq = applied_seq

    async def statistics(self, terms: Sequence[str]) -> LexicalStatistics:
        if self.statistics_error:
            raise self.statistics_error
        texts = [self.rows[row].text.split() for row in self.live.values()]
        return LexicalStatistics(len(texts), {term: sum(term in text for text in texts) for term in terms})

    async def search(self, query: ShardQuery) -> ShardAnswer:
        self.asked = query
        self.searching += 1
        try:
            if self.search_gate:
                await self.search_gate.wait()
            if self.search_error:
                raise self.search_error
        finally:
            self.searching -= 1
        found = [
            Candidate(id_, self.number, row, None, 1.0)
            for id_, row in self.live.items()
            if set(query.terms) & set(self.rows[row].text.split())
        ]
        return ShardAnswer(self.number, self.applied_seq, found[: query.limit], {"lexical": float(self.number)})

    async def fetch(self, rows: Sequence[int], *, vectors: bool = False) -> dict[int, ShardDocument]:
        if self.search_error:
            raise self.search_error
        held = {row: self.rows[row] for row in rows if row in self.live.values()}
        return {
            row: ShardDocument(document.id, document.text, None, {}, document.vector if vectors else None)
            for row, document in held.items()
        }

    async def aclose(self) -> None:
        self.closed = True


class Workshop:
    """Makes shards and remembers them; *refuse* says which cannot be made."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int], DictionaryShard] = {}
        self.prepare: Callable[[DictionaryShard], None] = lambda shard: None
        self.refuse: set[int] = set()

    def __call__(self, collection: Collection, number: int) -> DictionaryShard:
        if number in self.refuse:
            raise OSError("the file is broken")
        shard = self.made[collection.uuid, number] = DictionaryShard(number)
        self.prepare(shard)
        return shard

    def of(self, collection: Collection) -> list[DictionaryShard]:
        return [self.made[collection.uuid, number] for number in range(collection.shards)]


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger(BOOKS, FILMS)


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
def discarded() -> list[str]:
    return []


@pytest.fixture
async def retriever(ledger: MemoryLedger, workshop: Workshop, discarded: list[str]) -> AsyncIterator[LocalRetriever]:
    made = LocalRetriever(
        ledger,
        workshop,
        str.split,
        discard=lambda collection: discarded.append(collection.uuid),
        poll_s=0.05,
    )
    yield made
    await made.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower_module, "FIRST_RETRY_S", 0.01)


def soon(seconds: float = 5.0) -> Deadline:
    return Deadline.after(seconds)


def word(text: str, limit: int = 1000) -> RetrievalQuery:
    return RetrievalQuery(limit, text=text)


def ids_of(retrieved: Retrieved) -> set[str]:
    return {candidate.id for candidate in retrieved.candidates}


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds; fail if it never does."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("It never came about")


def many(count: int, text: str = "word") -> dict[str, str]:
    return {f"d{n}": text for n in range(count)}


# --- placement


def test_placement_never_changes() -> None:
    """The shard of an id is the same in every version: documents would be lost otherwise."""
    assert [shard_of(id_, 8) for id_ in ("", "a", "doc-1", "\U0001f600")] == [4, 0, 6, 5]


def test_placement_is_even() -> None:
    """Ids spread over all shards, none more than a tenth above its share."""
    for shards in (1, 3, 8):
        counts = Counter(shard_of(f"document {n}", shards) for n in range(20_000))
        assert set(counts) == set(range(shards))
        assert max(counts.values()) < 20_000 / shards * 1.1


# --- following


async def test_every_document_is_on_its_shard(ledger, workshop, retriever) -> None:
    """All operations of a long log arrive, each on the shard of its id, and every shard stands at the end."""
    seq = ledger.write(BOOKS, **many(2 * PAGE + 7))
    await retriever.open_collections()
    assert await retriever.wait_applied(BOOKS, seq, soon())
    for shard in workshop.of(BOOKS):
        assert set(shard.live) == {id_ for id_ in many(2 * PAGE + 7) if shard_of(id_, 4) == shard.number}
        assert shard.applied_seq == seq
    assert await retriever.applied_seq(BOOKS) == seq


async def test_shards_without_operations_move_forward_too(ledger, workshop, retriever) -> None:
    """One document moves all shards to its number."""
    seq = ledger.write(BOOKS, d1="word")
    assert await retriever.wait_applied(BOOKS, seq, soon())
    assert [shard.applied_seq for shard in workshop.of(BOOKS)] == [1, 1, 1, 1]


async def test_updates_and_deletions_follow(ledger, retriever) -> None:
    """After the ledger's last operation is applied, searches find the new text and not the deleted document."""
    ledger.write(BOOKS, a="old", b="old")
    await retriever.wait_applied(BOOKS, 2, soon())
    seq = ledger.write(BOOKS, a="new", b=None)
    retriever.notify(BOOKS, seq)
    assert await retriever.wait_applied(BOOKS, seq, soon())
    assert ids_of(await retriever.retrieve(BOOKS, word("old"), soon())) == set()
    assert ids_of(await retriever.retrieve(BOOKS, word("new"), soon())) == {"a"}


async def test_a_notice_is_acted_on_at_once(ledger, workshop) -> None:
    """With polls an hour apart a notified write is applied at once, and nothing is read without one."""
    retriever = LocalRetriever(ledger, workshop, str.split, poll_s=3600)
    await retriever.open_collections()
    await asyncio.sleep(0.02)
    before = ledger.reads
    seq = ledger.write(BOOKS, a="word")
    await asyncio.sleep(0.02)
    assert ledger.reads == before
    retriever.notify(BOOKS, seq)
    await eventually(lambda: all(shard.applied_seq == seq for shard in workshop.of(BOOKS)))
    await retriever.aclose()


async def test_without_a_notice_the_poll_finds_it(ledger, retriever) -> None:
    """A write that nobody announces is applied at the next poll."""
    await retriever.open_collections()
    ledger.write(BOOKS, a="word")
    for _ in range(500):
        found = ids_of(await retriever.retrieve(BOOKS, word("word"), soon()))
        if found:
            break
        await asyncio.sleep(0.01)
    assert found == {"a"}


async def test_waiting_ends_with_the_deadline(ledger, retriever) -> None:
    """Waiting for an operation that never comes returns False at the deadline, not before."""
    began = time.monotonic()
    assert await retriever.wait_applied(BOOKS, 99, soon(0.1)) is False
    assert 0.09 < time.monotonic() - began < 1


async def test_shards_catch_up_while_they_answer(ledger, workshop, retriever) -> None:
    """A shard behind the ledger as it was at opening answers and is counted as catching up, until it is there."""
    gate = asyncio.Event()
    workshop.prepare = lambda shard: setattr(shard, "apply_gate", gate)
    ledger.write(BOOKS, **many(20))
    await retriever.open_collections()
    behind = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (behind.total, behind.ok, behind.catching_up, behind.as_of) == (4, 4, 4, 0)
    gate.set()
    await retriever.wait_applied(BOOKS, 20, soon())
    there = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (there.ok, there.catching_up, there.as_of, len(ids_of(there))) == (4, 0, 20, 20)
    gate.clear()
    ledger.write(BOOKS, new="word")
    await asyncio.sleep(0.1)
    later = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (later.catching_up, later.as_of) == (0, 20)
    gate.set()


@pytest.mark.usefixtures("quick_retries")
async def test_a_failing_apply_is_reported_and_recovers(ledger, workshop, retriever) -> None:
    """One shard that cannot apply is named, still searched as it was, and catches up later; the others go on."""
    ledger.write(BOOKS, **many(20))
    await retriever.wait_applied(BOOKS, 20, soon())
    bad = workshop.of(BOOKS)[2]
    bad.apply_error = BackendFailed("the index is broken")
    seq = ledger.write(BOOKS, **many(40, "newer"))
    assert await retriever.wait_applied(BOOKS, seq, soon(0.1)) is False
    await eventually(lambda: [shard.applied_seq for shard in workshop.of(BOOKS)] == [seq, seq, 20, seq])
    found = await retriever.retrieve(BOOKS, word("newer word"), soon())
    assert (found.ok, found.as_of) == (4, 20)
    assert found.failures.keys() == {2}
    assert "the index is broken" in found.failures[2]
    bad.apply_error = None
    assert await retriever.wait_applied(BOOKS, seq, soon())
    found = await retriever.retrieve(BOOKS, word("newer"), soon())
    assert (len(ids_of(found)), found.failures) == (40, {})


@pytest.mark.usefixtures("quick_retries")
async def test_retries_grow_rarer(ledger, workshop, retriever) -> None:
    """A shard that keeps failing is tried again with pauses that double, not in a loop."""
    error = BackendFailed("broken")
    workshop.prepare = lambda shard: setattr(shard, "apply_error", error if shard.number == 0 else None)
    ledger.write(BOOKS, **many(PAGE + 1))
    await retriever.open_collections()
    tries = workshop.of(BOOKS)[0].applied_at
    await eventually(lambda: len(tries) >= 6)
    pauses = [after - before for before, after in pairwise(tries[:6])]
    assert all(pause > 0.9 * 0.01 * 2**turn for turn, pause in enumerate(pauses))


async def test_a_hanging_apply_does_not_hold_the_others(ledger, workshop, retriever, monkeypatch) -> None:
    """While one shard's apply hangs the others take later operations, and it meets them again when it is done."""
    monkeypatch.setattr(follower_module, "PATIENCE_S", 0.05)
    await retriever.open_collections()
    gate = workshop.of(BOOKS)[1].apply_gate = asyncio.Event()
    ledger.write(BOOKS, **many(20))
    await asyncio.sleep(0.1)
    seq = ledger.write(BOOKS, **many(40, "newer"))
    await eventually(lambda: [shard.applied_seq for shard in workshop.of(BOOKS)] == [seq, 0, seq, seq])
    gate.set()
    assert await retriever.wait_applied(BOOKS, seq, soon())


@pytest.mark.usefixtures("quick_retries")
async def test_a_shard_that_cannot_be_opened_is_tried_again(ledger, workshop, retriever) -> None:
    """It is reported, the others answer, and once it can be opened it catches up."""
    workshop.refuse = {3}
    seq = ledger.write(BOOKS, **many(20))
    await retriever.open_collections()
    found = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (found.total, found.ok, set(found.failures)) == (4, 3, {3})
    workshop.refuse = set()
    assert await retriever.wait_applied(BOOKS, seq, soon())
    assert len(ids_of(await retriever.retrieve(BOOKS, word("word"), soon()))) == 20


@pytest.mark.usefixtures("quick_retries")
async def test_a_ledger_that_is_away_comes_back(ledger, retriever) -> None:
    """Without the ledger collections open and answer, as catching up; they follow once it is there."""
    seq = ledger.write(BOOKS, a="word")
    ledger.down = True
    await retriever.open_collections()
    found = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (found.ok, found.catching_up, found.as_of) == (4, 4, 0)
    ledger.down = False
    assert await retriever.wait_applied(BOOKS, seq, soon())
    assert (await retriever.retrieve(BOOKS, word("word"), soon())).catching_up == 0


async def test_a_deleted_collection_cannot_be_opened(ledger, workshop, retriever) -> None:
    """A collection that the ledger does not have is NotFound, and its shards are closed."""
    gone = Collection("uuid-gone", "gone", None, "fp", 2, 2, 0.0)
    with pytest.raises(NotFound):
        await retriever.retrieve(gone, word("word"), soon())
    assert all(shard.closed for shard in workshop.of(gone))
    retriever.notify(gone, 1)
    await asyncio.sleep(0.02)


# --- asking


async def test_all_shards_get_the_same_global_statistics(ledger, workshop, retriever) -> None:
    """Each shard is asked with the terms as often as they stand and with the sums over all shards."""
    ledger.write(BOOKS, **many(20, "red"), **{f"b{n}": "blue" for n in range(10)})
    await retriever.wait_applied(BOOKS, 30, soon())
    found = await retriever.retrieve(BOOKS, word("red blue red"), soon())
    for shard in workshop.of(BOOKS):
        assert list(shard.asked.terms) == ["red", "blue", "red"]
        assert shard.asked.statistics == LexicalStatistics(30, {"red": 20, "blue": 10})
    assert found.timings_ms["lexical"] == 3.0
    assert found.timings_ms.keys() == {"lexical", "statistics"}


async def test_a_vector_alone_asks_for_no_statistics(ledger, workshop, retriever) -> None:
    """A query without text reaches the shards without terms or statistics, filter and vector untouched."""
    vector, filter_ = np.ones(2, dtype=np.float32), object()
    await retriever.retrieve(BOOKS, RetrievalQuery(5, vector, None, filter_), soon())
    for shard in workshop.of(BOOKS):
        assert shard.asked == ShardQuery(5, vector, (), None, filter_)


async def test_a_shard_that_raises_is_counted(ledger, workshop, retriever) -> None:
    """One shard's error in search or statistics is reported under its number; the others' candidates come."""
    ledger.write(BOOKS, **many(20))
    await retriever.wait_applied(BOOKS, 20, soon())
    workshop.of(BOOKS)[0].search_error = ValueError("secret detail")
    workshop.of(BOOKS)[1].statistics_error = BackendFailed("no statistics")
    found = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (found.total, found.ok, found.timed_out) == (4, 2, 0)
    assert found.failures == {0: "ValueError", 1: "no statistics"}
    assert {candidate.shard for candidate in found.candidates} == {2, 3}


async def test_a_shard_that_hangs_is_late(ledger, workshop, retriever) -> None:
    """The others' candidates come at the deadline; the late search goes on and ends by itself."""
    ledger.write(BOOKS, **many(20))
    await retriever.wait_applied(BOOKS, 20, soon())
    slow = workshop.of(BOOKS)[1]
    slow.search_gate = asyncio.Event()
    began = time.monotonic()
    found = await retriever.retrieve(BOOKS, word("word"), soon(0.2))
    assert 0.15 < time.monotonic() - began < 1
    assert (found.ok, found.timed_out, found.failures) == (3, 1, {})
    assert {candidate.shard for candidate in found.candidates} == {0, 2, 3}
    assert slow.searching == 1
    slow.search_gate.set()
    await asyncio.sleep(0.01)
    assert slow.searching == 0


async def test_no_answer_is_an_empty_result(ledger, workshop, retriever) -> None:
    """When every shard fails nothing is raised: ok is 0 and every failure is named."""
    await retriever.open_collections()
    for shard in workshop.of(BOOKS):
        shard.search_error = BackendFailed("broken")
    found = await retriever.retrieve(BOOKS, word("word"), soon())
    assert (found.candidates, found.ok, len(found.failures), found.as_of) == ([], 0, 4, 0)


async def test_a_passed_deadline_is_an_empty_result(ledger, workshop, retriever) -> None:
    """With no time left all shards of a collection that is not open yet count as late."""
    found = await retriever.retrieve(BOOKS, word("word"), soon(-1))
    assert (found.total, found.ok, found.timed_out) == (4, 0, 4)


async def test_bad_input_is_the_callers(ledger, workshop, retriever) -> None:
    """InvalidInput from a shard reaches the caller instead of counting as a failure."""
    await retriever.open_collections()
    workshop.of(BOOKS)[0].search_error = InvalidInput("the vector has 3 numbers")
    with pytest.raises(InvalidInput):
        await retriever.retrieve(BOOKS, word("word"), soon())


async def test_a_cancelled_caller_stops_only_itself(ledger, workshop, retriever) -> None:
    """Its own searches end, another caller's go on, and the collection is opened all the same."""
    gate = asyncio.Event()
    workshop.prepare = lambda shard: setattr(shard, "search_gate", gate)
    early = asyncio.create_task(retriever.retrieve(BOOKS, word("word"), NO_DEADLINE))
    await asyncio.sleep(0)
    early.cancel()
    await retriever.open_collections()
    gone = asyncio.create_task(retriever.retrieve(BOOKS, word("word"), NO_DEADLINE))
    stays = asyncio.create_task(retriever.retrieve(BOOKS, word("word"), NO_DEADLINE))
    await eventually(lambda: workshop.of(BOOKS)[0].searching == 2)
    gone.cancel()
    await eventually(lambda: workshop.of(BOOKS)[0].searching == 1)
    gate.set()
    assert (await stays).ok == 4
    assert early.cancelled()


async def test_fetch_returns_what_is_still_there(ledger, workshop, retriever) -> None:
    """Fields come by id over all shards, with vectors if asked; replaced rows and failing shards are missing."""
    ledger.write(BOOKS, **many(20))
    await retriever.wait_applied(BOOKS, 20, soon())
    candidates = (await retriever.retrieve(BOOKS, word("word"), soon())).candidates
    found = await retriever.fetch(BOOKS, candidates, soon())
    assert found.keys() == set(many(20))
    assert found["d3"] == ShardDocument("d3", "word", None, {}, None)
    assert (await retriever.fetch(BOOKS, candidates, soon(), vectors=True))["d3"].vector.tolist() == [1.0, 4.0]
    await retriever.wait_applied(BOOKS, ledger.write(BOOKS, d3="newer", d4=None), soon())
    assert set(many(20)) - (await retriever.fetch(BOOKS, candidates, soon())).keys() == {"d3", "d4"}
    workshop.of(BOOKS)[0].search_error = BackendFailed("broken")
    kept = await retriever.fetch(BOOKS, candidates, soon())
    assert kept.keys() == {id_ for id_ in many(20) if shard_of(id_, 4) != 0} - {"d3", "d4"}
    assert await retriever.fetch(BOOKS, [], soon()) == {}


# --- ends


async def test_a_forgotten_collection_is_closed_and_removed(ledger, workshop, retriever, discarded) -> None:
    """Its shards are closed, then discarded, waiters are told, and it cannot be opened again; others stay."""
    await retriever.open_collections()
    waiter = asyncio.create_task(retriever.wait_applied(BOOKS, 99, NO_DEADLINE))
    await asyncio.sleep(0)
    await retriever.forget(BOOKS)
    assert await waiter is False
    assert all(shard.closed for shard in workshop.of(BOOKS))
    assert discarded == [BOOKS.uuid]
    with pytest.raises(NotFound):
        await retriever.retrieve(BOOKS, word("word"), soon())
    retriever.notify(BOOKS, 5)
    assert (await retriever.retrieve(FILMS, word("word"), soon())).ok == 2


async def test_forgetting_goes_on_when_its_caller_is_cancelled(ledger, workshop, retriever, discarded) -> None:
    """A cancelled `forget` still closes and removes the shards."""
    await retriever.open_collections()
    task = asyncio.create_task(retriever.forget(BOOKS))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: discarded == [BOOKS.uuid])
    assert all(shard.closed for shard in workshop.of(BOOKS))


async def test_forgetting_during_the_opening_leaves_nothing_open(ledger, workshop, retriever) -> None:
    """A collection that is forgotten while it opens is closed once it is open."""
    made, go_on = threading.Event(), threading.Event()

    def hold_up(shard: DictionaryShard) -> None:
        made.set()
        go_on.wait(5)

    workshop.prepare = hold_up
    retriever.notify(BOOKS, 1)
    await asyncio.to_thread(made.wait, 5)
    forgetting = asyncio.create_task(retriever.forget(BOOKS))
    await asyncio.sleep(0.01)
    go_on.set()
    await forgetting
    assert all(shard.closed for shard in workshop.of(BOOKS))


async def test_closing_closes_all_shards(ledger, workshop, retriever) -> None:
    """After `aclose` every shard is closed, late searches are over and questions are refused; twice is allowed."""
    await retriever.open_collections()
    workshop.of(BOOKS)[0].search_gate = asyncio.Event()
    await retriever.retrieve(BOOKS, word("word"), soon(0.05))
    await retriever.aclose()
    await retriever.aclose()
    assert all(shard.closed for shard in workshop.made.values())
    with pytest.raises(NotReady):
        await retriever.retrieve(BOOKS, word("word"), soon())
