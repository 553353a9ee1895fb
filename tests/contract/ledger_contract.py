"""What every ledger must do, as tests: a subclass says how to open one."""

import asyncio
import random
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import Conflict, InvalidInput, NotFound, NotReady
from services.search.ports import Collection, CollectionState, Ledger, LedgerDocument, Operation

DIM = 4


def make_collection(name: str = "books", **changes) -> Collection:
    """Return a new collection with a uuid of its own."""
    made = Collection(str(uuid.uuid4()), name, "some/model", "fp-1", DIM, 2, time.time())
    return replace(made, **changes)


def make_document(id_: str, text: str = "text", **changes) -> LedgerDocument:
    """Return a document whose vector and hashes follow from its text."""
    random_numbers = np.random.default_rng(crc32(text.encode()))
    made = LedgerDocument(
        id=id_,
        text=text,
        title=None,
        metadata={"lang": "en", "pages": 12, "score": 0.5, "free": True, "tags": ["a", "b"]},
        vector=random_numbers.random(DIM, dtype=np.float32),
        content_hash=f"content of {text}".encode(),
        embedded_hash=f"embedded {text}".encode(),
    )
    return replace(made, **changes)


def same(left: LedgerDocument, right: LedgerDocument) -> bool:
    """Whether two documents are equal in every field, vectors bit by bit."""
    plain = replace(left, vector=right.vector) == right
    return plain and left.vector.dtype == np.float32 and np.array_equal(left.vector, right.vector)


async def log(ledger: Ledger, collection: Collection, *, page: int = 1000) -> list[Operation]:
    """Return the whole operation log, read page by page."""
    operations: list[Operation] = []
    seq = 0
    while found := await ledger.operations_after(collection.uuid, seq, limit=page):
        assert len(found) <= page
        operations.extend(found)
        seq = found[-1].seq
    return operations


@dataclass
class Model:
    """What a ledger of one collection should hold, as dictionaries."""

    seq: int = 0
    last: dict[str, tuple[int, LedgerDocument | None]] = field(default_factory=dict)

    def append(self, documents: list[LedgerDocument]) -> int:
        for document in documents:
            self.seq += 1
            self.last[document.id] = (self.seq, document)
        return self.seq

    def delete(self, ids: list[str]) -> tuple[int, int]:
        doomed = [id_ for id_ in dict.fromkeys(ids) if self.last.get(id_, (0, None))[1] is not None]
        for id_ in doomed:
            self.seq += 1
            self.last[id_] = (self.seq, None)
        return len(doomed), self.seq

    @property
    def live(self) -> dict[str, LedgerDocument]:
        return {id_: document for id_, (_, document) in self.last.items() if document is not None}

    async def check(self, ledger: Ledger, collection: Collection) -> None:
        assert await ledger.state(collection.uuid) == CollectionState(self.seq, len(self.live))
        operations = await log(ledger, collection, page=3)
        assert [(op.seq, op.id) for op in operations] == sorted((seq, id_) for id_, (seq, _) in self.last.items())
        for op in operations:
            expected = self.last[op.id][1]
            assert (op.document is None) == (expected is None)
            assert op.document is None or same(op.document, expected)
        documents = await ledger.documents(collection.uuid, list(self.last))
        assert documents.keys() == self.live.keys()
        assert all(same(documents[id_], document) for id_, document in self.live.items())


_ids = st.sampled_from([f"d{n}" for n in range(8)])
_step = st.one_of(
    st.tuples(st.just("append"), st.lists(st.tuples(_ids, st.text(max_size=5)), max_size=5)),
    st.tuples(st.just("delete"), st.lists(_ids, max_size=4)),
    st.tuples(st.just("reopen"), st.none()),
    st.tuples(st.just("recreate"), st.none()),
)


class LedgerContract:
    """Inherit and override `open`; *place* is a directory that stands for one database."""

    async def open(self, place: Path) -> Ledger:
        """Open the ledger of *place*, creating it the first time."""
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self, place: Path) -> AsyncIterator[Ledger]:
        """Open the ledger of *place* and close it at the end."""
        ledger = await self.open(place)
        try:
            yield ledger
        finally:
            await ledger.aclose()

    @pytest.fixture
    async def stack(self) -> AsyncIterator[AsyncExitStack]:
        async with AsyncExitStack() as stack:
            yield stack

    @pytest.fixture
    async def ledger(self, tmp_path: Path, stack: AsyncExitStack) -> Ledger:
        return await stack.enter_async_context(self.opened(tmp_path))

    @pytest.fixture
    def reopen(self, tmp_path: Path, ledger: Ledger, stack: AsyncExitStack) -> Callable[[], Awaitable[Ledger]]:
        async def again() -> Ledger:
            await stack.aclose()
            return await stack.enter_async_context(self.opened(tmp_path))

        return again

    @pytest.fixture
    async def books(self, ledger: Ledger) -> Collection:
        collection = make_collection()
        await ledger.create_collection(collection)
        return collection

    # --- collections

    async def test_collections_are_listed_by_name_and_found(self, ledger: Ledger) -> None:
        """A created collection comes back with every field as it was given."""
        made = [make_collection("b"), make_collection("a", model=None), make_collection("ü", shards=8)]
        for collection in made:
            await ledger.create_collection(collection)
        assert await ledger.list_collections() == sorted(made, key=lambda collection: collection.name)
        assert await ledger.find_collection("a") == made[1]
        assert await ledger.find_collection("A") is None

    async def test_a_taken_name_is_refused(self, ledger: Ledger, books: Collection) -> None:
        """Of two collections of one name the second is a conflict, and the first stays as it was."""
        with pytest.raises(Conflict, match="books"):
            await ledger.create_collection(make_collection())
        assert await ledger.list_collections() == [books]

    async def test_one_of_many_racing_creators_wins(self, ledger: Ledger) -> None:
        """When many create one name at once, exactly one succeeds."""
        made = [make_collection() for _ in range(10)]
        outcomes = await asyncio.gather(*(ledger.create_collection(c) for c in made), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes].count(Conflict) == 9
        assert await ledger.find_collection("books") == made[outcomes.index(None)]

    async def test_a_recreated_name_holds_nothing_old(self, ledger: Ledger, books: Collection, reopen) -> None:
        """A collection made again under a deleted one's name starts at 0, and the old uuid answers nothing."""
        await ledger.append(books.uuid, [make_document(f"d{n}") for n in range(1200)])
        assert await ledger.delete_collection(books.uuid) is True
        assert await ledger.delete_collection(books.uuid) is False
        assert await ledger.find_collection("books") is None
        again = make_collection()
        await ledger.create_collection(again)
        for current in (ledger, None):
            current = current or await reopen()
            assert await current.list_collections() == [again]
            assert await current.state(again.uuid) == CollectionState(0, 0)
            assert await log(current, again) == await log(current, books) == []
            assert await current.documents(books.uuid, ["d1"]) == await current.known(books.uuid, ["d1"]) == {}
            for write in (current.append(books.uuid, []), current.delete(books.uuid, ["d1"])):
                with pytest.raises(NotFound):
                    await write

    async def test_unknown_collections_are_not_found(self, ledger: Ledger) -> None:
        """A uuid that never was is refused by writes and by state, and reads of documents find nothing."""
        with pytest.raises(NotFound):
            await ledger.append("nobody", [make_document("d1")])
        with pytest.raises(NotFound):
            await ledger.state("nobody")
        assert await ledger.delete_collection("nobody") is False
        assert await ledger.operations_after("nobody", 0, limit=10) == []

    # --- documents

    async def test_documents_come_back_as_they_were(self, ledger: Ledger, books: Collection) -> None:
        """Text, title, metadata, vector and hashes survive unchanged, however odd."""
        odd = make_document("id with\0nul \U0001f600", "a\0b\r\n", title="", metadata={})
        plain = make_document("plain", title="A title")
        assert await ledger.append(books.uuid, [odd, plain]) == 2
        found = await ledger.documents(books.uuid, [odd.id, plain.id, "missing", plain.id])
        assert found.keys() == {odd.id, plain.id}
        assert same(found[odd.id], odd)
        assert same(found[plain.id], plain)

    async def test_known_tells_hashes_and_vectors(self, ledger: Ledger, books: Collection) -> None:
        """`known` returns hashes and vectors of live documents only, for a thousand ids at once."""
        documents = [make_document(f"d{n}", f"text {n}") for n in range(1000)]
        await ledger.append(books.uuid, documents)
        await ledger.delete(books.uuid, ["d7"])
        known = await ledger.known(books.uuid, [document.id for document in documents])
        assert len(known) == 999
        assert known["d999"].content_hash == b"content of text 999"
        assert known["d999"].embedded_hash == b"embedded text 999"
        assert np.array_equal(known["d999"].vector, documents[999].vector)
        assert len(await ledger.documents(books.uuid, [document.id for document in documents])) == 999

    async def test_no_ids_find_nothing(self, ledger: Ledger, books: Collection) -> None:
        """Empty requests are allowed, change nothing and return the position as it is."""
        await ledger.append(books.uuid, [make_document("d1")])
        assert await ledger.append(books.uuid, []) == 1
        assert await ledger.delete(books.uuid, []) == (0, 1)
        assert await ledger.known(books.uuid, []) == await ledger.documents(books.uuid, []) == {}

    async def test_a_vector_of_the_wrong_shape_is_refused(self, ledger: Ledger, books: Collection) -> None:
        """A batch with one bad vector leaves nothing behind, and the error names the document."""
        bad = make_document("bad", vector=np.ones(DIM + 1, dtype=np.float32))
        with pytest.raises(InvalidInput, match="bad"):
            await ledger.append(books.uuid, [make_document("good"), bad])
        assert await ledger.state(books.uuid) == CollectionState(0, 0)
        assert await log(ledger, books) == []

    # --- operations

    async def test_each_operation_takes_the_next_number(self, ledger: Ledger, books: Collection) -> None:
        """Numbers grow by one per operation, also for an id that a batch repeats; the last of them holds."""
        assert await ledger.append(books.uuid, [make_document("a"), make_document("b")]) == 2
        assert await ledger.append(books.uuid, [make_document("a", "one"), make_document("a", "two")]) == 4
        assert await ledger.delete(books.uuid, ["b", "b", "missing"]) == (1, 5)
        assert await ledger.delete(books.uuid, ["b"]) == (0, 5)
        assert await ledger.state(books.uuid) == CollectionState(5, 1)
        assert (await ledger.documents(books.uuid, ["a", "b"]))["a"].text == "two"

    async def test_the_log_is_compacted_and_keeps_deletions(self, ledger: Ledger, books: Collection) -> None:
        """Only the last operation of a document is in the log, a deletion as an operation without document."""
        await ledger.append(books.uuid, [make_document("a"), make_document("b"), make_document("c")])
        await ledger.append(books.uuid, [make_document("a", "new")])
        await ledger.delete(books.uuid, ["b"])
        operations = await log(ledger, books)
        assert [(op.seq, op.id, op.document and op.document.text) for op in operations] == [
            (3, "c", "text"),
            (4, "a", "new"),
            (5, "b", None),
        ]
        assert [op.seq for op in await ledger.operations_after(books.uuid, 3, limit=1)] == [4]
        assert await ledger.operations_after(books.uuid, 5, limit=10) == []

    async def test_a_deleted_document_can_come_back(self, ledger: Ledger, books: Collection) -> None:
        """Writing a deleted id again makes it live under a new number."""
        await ledger.append(books.uuid, [make_document("a")])
        await ledger.delete(books.uuid, ["a"])
        assert await ledger.append(books.uuid, [make_document("a", "back")]) == 3
        assert await ledger.state(books.uuid) == CollectionState(3, 1)
        assert [op.seq for op in await log(ledger, books)] == [3]

    async def test_collections_count_apart(self, ledger: Ledger, books: Collection) -> None:
        """Each collection has its own numbers and its own documents under the same ids."""
        films = make_collection("films")
        await ledger.create_collection(films)
        assert await ledger.append(books.uuid, [make_document("a", "book")]) == 1
        assert await ledger.append(films.uuid, [make_document("a", "film")]) == 1
        assert (await ledger.documents(films.uuid, ["a"]))["a"].text == "film"
        await ledger.delete_collection(films.uuid)
        assert (await ledger.documents(books.uuid, ["a"]))["a"].text == "book"

    # --- many at once, cancellation, reopening

    async def test_concurrent_appends_lose_and_repeat_nothing(self, ledger: Ledger, books: Collection) -> None:
        """Appends from many tasks get distinct numbers that together leave no gap."""

        async def writer(number: int) -> list[int]:
            return [await ledger.append(books.uuid, [make_document(f"{number}-{turn}")]) for turn in range(20)]

        numbers = await asyncio.gather(*(writer(number) for number in range(16)))
        assert sorted(seq for mine in numbers for seq in mine) == list(range(1, 321))
        assert [op.seq for op in await log(ledger, books)] == list(range(1, 321))
        assert await ledger.state(books.uuid) == CollectionState(320, 320)

    async def test_one_bad_append_leaves_its_neighbours_alone(self, ledger: Ledger, books: Collection) -> None:
        """Of appends that wait together, those that fail take no number and do not disturb the others."""
        wrong = np.ones(1, dtype=np.float32)
        batches = [[make_document(f"d{n}", vector=wrong) if n % 3 == 0 else make_document(f"d{n}")] for n in range(30)]
        outcomes = await asyncio.gather(
            *(ledger.append(books.uuid, batch) for batch in batches), return_exceptions=True
        )
        assert all(isinstance(outcome, InvalidInput) == (n % 3 == 0) for n, outcome in enumerate(outcomes))
        assert [op.seq for op in await log(ledger, books)] == list(range(1, 21))

    async def test_a_cancelled_append_is_whole_or_absent(self, ledger: Ledger, books: Collection) -> None:
        """However early or late an append is cancelled, all of its documents are there or none."""
        chance = random.Random(5)
        for turn in range(40):
            batch = [make_document(f"{turn}-{n}") for n in range(20)]
            task = asyncio.create_task(ledger.append(books.uuid, batch))
            await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.001, 0.003]))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        last = await ledger.append(books.uuid, [make_document("end")])
        for turn in range(40):
            ids = [f"{turn}-{n}" for n in range(20)]
            assert len(await ledger.documents(books.uuid, ids)) in (0, 20)
        assert [op.seq for op in await log(ledger, books)] == list(range(1, last + 1))

    async def test_reopening_finds_everything(self, ledger: Ledger, books: Collection, reopen) -> None:
        """Epoch, collections, documents, tombstones and numbers are the same after reopening."""
        await ledger.append(books.uuid, [make_document("a", "kept"), make_document("b")])
        await ledger.delete(books.uuid, ["b"])
        epoch = ledger.epoch
        again = await reopen()
        assert again.epoch == epoch != ""
        assert await again.list_collections() == [books]
        assert await again.state(books.uuid) == CollectionState(3, 1)
        assert same((await again.documents(books.uuid, ["a"]))["a"], make_document("a", "kept"))
        assert [op.document is None for op in await log(again, books)] == [False, True]
        assert await again.append(books.uuid, [make_document("c")]) == 4

    async def test_two_ledgers_have_two_epochs(self, ledger: Ledger, tmp_path: Path) -> None:
        """A new ledger's epoch is unlike any other's."""
        async with self.opened(tmp_path / "other") as other:
            assert other.epoch != ledger.epoch

    async def test_a_closed_ledger_says_so(self, ledger: Ledger, books: Collection) -> None:
        """Calls under way when the ledger closes are finished; later ones are refused; closing twice is allowed."""
        appends = [asyncio.create_task(ledger.append(books.uuid, [make_document(f"d{n}")])) for n in range(5)]
        await asyncio.sleep(0)
        await ledger.aclose()
        assert await asyncio.gather(*appends) == [1, 2, 3, 4, 5]
        with pytest.raises(NotReady):
            await ledger.state(books.uuid)
        await ledger.aclose()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=st.lists(_step, max_size=12))
    def test_any_history_matches_a_dictionary(self, steps) -> None:
        """After any sequence of writes, reopenings and re-creations the ledger holds what a dictionary would."""

        async def live_through(place: Path) -> None:
            ledger = await self.open(place)
            collection, model = make_collection(), Model()
            await ledger.create_collection(collection)
            try:
                for action, given_ in steps:
                    if action == "append":
                        batch = [make_document(id_, text) for id_, text in given_]
                        assert await ledger.append(collection.uuid, batch) == model.append(batch)
                    elif action == "delete":
                        assert await ledger.delete(collection.uuid, given_) == model.delete(given_)
                    elif action == "recreate":
                        await ledger.delete_collection(collection.uuid)
                        collection, model = make_collection(), Model()
                        await ledger.create_collection(collection)
                    else:
                        await ledger.aclose()
                        ledger = await self.open(place)
                    await model.check(ledger, collection)
            finally:
                await ledger.aclose()

        with tempfile.TemporaryDirectory() as place:
            asyncio.run(live_through(Path(place)))
