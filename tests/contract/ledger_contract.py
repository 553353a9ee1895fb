"""What every ledger must do, as tests: a subclass says how to open one."""

import asyncio
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import Conflict, InvalidInput, NotFound, NotReady
from services.search.ports import Collection, CollectionState, Ledger, Receipt, Written
from tests.contract.ledger_condition_contract import ConditionContract
from tests.contract.ledger_model import DIM, Model, log, make_collection, make_document, same

_ids = st.sampled_from([f"d{n}" for n in range(8)])
_expected = st.dictionaries(_ids, st.integers(0, 12), max_size=2)
_steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("append"),
            st.lists(st.tuples(_ids, st.text(max_size=5)), max_size=5, unique_by=lambda pair: pair[0]),
            _expected,
        ),
        st.tuples(st.just("delete"), st.lists(_ids, max_size=4), _expected),
        st.tuples(st.just("trim"), st.integers(0, 30), st.none()),
        st.tuples(st.just("alias"), st.sampled_from(["x", "y"]), st.sampled_from(["books", None])),
        st.tuples(st.just("reopen"), st.none(), st.none()),
        st.tuples(st.just("recreate"), st.none(), st.none()),
    ),
    max_size=12,
)


class LedgerContract(ConditionContract):
    """Inherit and override `open`; *place* is a directory that stands for one database."""

    # --- collections

    async def test_collections_are_listed_by_name_and_found(self, ledger: Ledger) -> None:
        """A created collection comes back with every field as it was given."""
        kinds = {"year": "number", "day": "date", "tag": "keyword", "free": "bool", "other": "any"}
        made = [
            make_collection("b", metric="dot", attributes=kinds, language="german"),
            make_collection("a", model=None, attributes={}),
            make_collection("ü", shards=8, metric="l2"),
        ]
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

    # --- aliases

    async def test_an_alias_means_its_collection(self, ledger: Ledger, books: Collection, reopen) -> None:
        """A collection is found by its aliases, also after reopening, and listed under its own name only."""
        await ledger.set_aliases({"shelf": "books", "best": "books"})
        for current in (ledger, None):
            current = current or await reopen()
            assert await current.find_collection("shelf") == await current.find_collection("books") == books
            assert await current.list_collections() == [books]
            assert await current.list_aliases() == {"best": "books", "shelf": "books"}

    async def test_aliases_change_together_or_not_at_all(self, ledger: Ledger, books: Collection) -> None:
        """One bad change leaves all aliases as they were; good ones move, begin and end in one step."""
        films = make_collection("films")
        await ledger.create_collection(films)
        await ledger.set_aliases({"a": "books", "b": "books"})
        for bad, error in (({"c": "nothing"}, NotFound), ({"c": "a"}, NotFound), ({"films": "books"}, Conflict)):
            with pytest.raises(error):
                await ledger.set_aliases({"a": "films", "b": None, **bad})
            assert await ledger.list_aliases() == {"a": "books", "b": "books"}
        await ledger.set_aliases({"a": "films", "b": None, "c": "books", "never": None})
        assert await ledger.list_aliases() == {"a": "films", "c": "books"}
        assert await ledger.find_collection("a") == films
        assert await ledger.find_collection("b") is None

    async def test_a_switch_is_never_seen_half_done(self, ledger: Ledger, books: Collection) -> None:
        """Who reads while two aliases are exchanged finds them before or after."""
        await ledger.create_collection(make_collection("films"))
        before, after = {"a": "books", "b": "films"}, {"a": "films", "b": "books"}
        await ledger.set_aliases(before)

        async def exchange() -> None:
            for turn in range(20):
                await ledger.set_aliases((after, before)[turn % 2])

        exchanging = asyncio.create_task(exchange())
        while not exchanging.done():
            assert await ledger.list_aliases() in (before, after)
        await exchanging

    async def test_names_and_aliases_share_one_space(self, ledger: Ledger, books: Collection) -> None:
        """A collection cannot take an alias's name; the alias ends with its collection, and its name is free again."""
        await ledger.set_aliases({"shelf": "books"})
        with pytest.raises(Conflict, match="shelf"):
            await ledger.create_collection(make_collection("shelf"))
        await ledger.delete_collection(books.uuid)
        assert await ledger.list_aliases() == {}
        assert await ledger.find_collection("shelf") is None
        await ledger.create_collection(make_collection("shelf"))

    # --- documents

    async def test_documents_come_back_as_they_were(self, ledger: Ledger, books: Collection) -> None:
        """Text, title, metadata, vector and hashes survive unchanged, however odd."""
        odd = make_document("id with\0nul \U0001f600", "a\0b\r\n", title="", metadata={})
        plain = make_document("plain", title="A title")
        assert (await ledger.append(books.uuid, [odd, plain])).seq == 2
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
        assert known["d999"].seq == 1000
        assert np.array_equal(known["d999"].vector, documents[999].vector)
        assert len(await ledger.documents(books.uuid, [document.id for document in documents])) == 999

    async def test_no_ids_find_nothing(self, ledger: Ledger, books: Collection) -> None:
        """Empty requests are allowed, change nothing and return the position as it is."""
        await ledger.append(books.uuid, [make_document("d1")])
        assert (await ledger.append(books.uuid, [])).seq == 1
        assert await ledger.delete(books.uuid, []) == Written(1, 0)
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
        """Numbers grow by one per operation, and `changed` counts what was done."""
        assert await ledger.append(books.uuid, [make_document("a"), make_document("b")]) == Written(2, 2)
        assert await ledger.append(books.uuid, [make_document("a", "two")]) == Written(3, 1)
        assert await ledger.delete(books.uuid, ["b", "b", "missing"]) == Written(4, 1)
        assert await ledger.delete(books.uuid, ["b"]) == Written(4, 0)
        assert await ledger.state(books.uuid) == CollectionState(4, 1)
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
        assert (await ledger.append(books.uuid, [make_document("a", "back")])).seq == 3
        assert await ledger.state(books.uuid) == CollectionState(3, 1)
        assert [op.seq for op in await log(ledger, books)] == [3]

    async def test_collections_count_apart(self, ledger: Ledger, books: Collection) -> None:
        """Each collection has its own numbers and its own documents under the same ids."""
        films = make_collection("films")
        await ledger.create_collection(films)
        assert (await ledger.append(books.uuid, [make_document("a", "book")])).seq == 1
        assert (await ledger.append(films.uuid, [make_document("a", "film")])).seq == 1
        assert (await ledger.documents(films.uuid, ["a"]))["a"].text == "film"
        await ledger.delete_collection(films.uuid)
        assert (await ledger.documents(books.uuid, ["a"]))["a"].text == "book"

    # --- many at once, cancellation, reopening

    async def test_concurrent_appends_lose_and_repeat_nothing(self, ledger: Ledger, books: Collection) -> None:
        """Appends from many tasks get distinct numbers that together leave no gap."""

        async def writer(number: int) -> list[int]:
            batches = [[make_document(f"{number}-{turn}")] for turn in range(20)]
            return [(await ledger.append(books.uuid, batch)).seq for batch in batches]

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
        last = (await ledger.append(books.uuid, [make_document("end")])).seq
        for turn in range(40):
            ids = [f"{turn}-{n}" for n in range(20)]
            assert len(await ledger.documents(books.uuid, ids)) in (0, 20)
        assert [op.seq for op in await log(ledger, books)] == list(range(1, last + 1))

    async def test_reopening_finds_everything(self, ledger: Ledger, books: Collection, reopen) -> None:
        """Collections, documents, tombstones and numbers are the same after reopening."""
        await ledger.append(books.uuid, [make_document("a", "kept"), make_document("b")])
        await ledger.delete(books.uuid, ["b"])
        again = await reopen()
        assert await again.list_collections() == [books]
        assert await again.state(books.uuid) == CollectionState(3, 1)
        assert same((await again.documents(books.uuid, ["a"]))["a"], make_document("a", "kept"))
        assert [op.document is None for op in await log(again, books)] == [False, True]
        assert (await again.append(books.uuid, [make_document("c")])).seq == 4

    async def test_two_ledgers_have_two_epochs(self, ledger: Ledger, tmp_path: Path) -> None:
        """A new ledger's epoch is unlike any other's."""
        async with self.opened(tmp_path / "other") as other:
            assert other.epoch != ledger.epoch

    async def test_a_closed_ledger_says_so(self, ledger: Ledger, books: Collection) -> None:
        """Calls under way when the ledger closes are finished; later ones are refused; closing twice is allowed."""
        appends = [asyncio.create_task(ledger.append(books.uuid, [make_document(f"d{n}")])) for n in range(5)]
        await asyncio.sleep(0)
        await ledger.aclose()
        assert sorted(written.seq for written in await asyncio.gather(*appends)) == [1, 2, 3, 4, 5]
        with pytest.raises(NotReady):
            await ledger.state(books.uuid)
        await ledger.aclose()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=_steps)
    def test_any_history_matches_a_dictionary(self, steps) -> None:
        """After any sequence of writes, trims, aliases, reopenings and re-creations it holds what a dictionary would."""
        with tempfile.TemporaryDirectory() as place:
            asyncio.run(self.live_through(Path(place), steps))

    async def live_through(self, place: Path, steps) -> None:
        """Do *steps* to a new ledger and to a model of it, and compare after each."""
        ledger = await self.open(place)
        collection, model, aliases = make_collection(), Model(), {}
        await ledger.create_collection(collection)
        try:
            for turn, (action, what, how) in enumerate(steps):
                receipt = Receipt(f"key {turn}", b"digest", b"body")
                options = {"expected": how, "receipt": receipt}
                if action == "append":
                    batch = [make_document(id_, text) for id_, text in what]
                    assert await ledger.append(collection.uuid, batch, **options) == model.append(batch, **options)
                elif action == "delete":
                    assert await ledger.delete(collection.uuid, what, **options) == model.delete(what, **options)
                elif action == "trim":
                    assert await ledger.trim(collection.uuid, what) == model.trim(what)
                elif action == "alias":
                    await ledger.set_aliases({what: how})
                    aliases = {**aliases, what: how}
                elif action == "recreate":
                    await ledger.delete_collection(collection.uuid)
                    collection, model, aliases = make_collection(), Model(), {}
                    await ledger.create_collection(collection)
                else:
                    epoch = ledger.epoch
                    await ledger.aclose()
                    ledger = await self.open(place)
                    assert await ledger.shares_history(collection.uuid, epoch, model.seq)
                await model.check(ledger, collection)
                assert await ledger.list_aliases() == {alias: name for alias, name in sorted(aliases.items()) if name}
        finally:
            await ledger.aclose()
