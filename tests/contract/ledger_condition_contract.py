"""What every ledger must do with conditions, receipts, trimming and its history: a part of the ledger's contract."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from services.common.errors import Conflict, InvalidInput, NotReady
from services.search.ports import NO_DOCUMENT, Collection, CollectionState, Ledger, Receipt, Written
from tests.contract.ledger_model import DIM, log, make_collection, make_document
from tests.contract.ledger_place import LedgerPlace


class ConditionContract(LedgerPlace):
    """Conditional writes, idempotency keys, the trimming of the log, epochs and news."""

    # --- conditions, receipts, trimming

    async def test_a_condition_guards_its_document_only(self, ledger: Ledger, books: Collection) -> None:
        """Documents that stand elsewhere than expected are reported with where they stand; the others are stored."""
        await ledger.append(books.uuid, [make_document("a"), make_document("b"), make_document("gone")])
        await ledger.delete(books.uuid, ["gone"])
        batch = [make_document(id_, "new") for id_ in ("a", "b", "c", "gone", "d", "free")]
        expected = {"a": 1, "b": 1, "c": 7, "gone": 3, "d": NO_DOCUMENT, "elsewhere": 5}
        written = await ledger.append(books.uuid, batch, expected=expected)
        assert written == Written(7, 3, {"b": 2, "c": NO_DOCUMENT, "gone": NO_DOCUMENT})
        assert [(op.seq, op.id) for op in await log(ledger, books)] == [
            (2, "b"), (4, "gone"), (5, "a"), (6, "d"), (7, "free"),
        ]  # fmt: skip
        written = await ledger.append(books.uuid, [make_document("a", "newer")], expected={"a": NO_DOCUMENT})
        assert written == Written(7, 0, {"a": 5})
        assert (await ledger.documents(books.uuid, ["a"]))["a"].text == "new"

    async def test_a_condition_guards_a_deletion(self, ledger: Ledger, books: Collection) -> None:
        """A deletion is done at the expected operation only; that nothing is there can be expected too."""
        await ledger.append(books.uuid, [make_document("a"), make_document("b")])
        expected = {"a": 1, "b": 1, "c": 2, "d": NO_DOCUMENT}
        written = await ledger.delete(books.uuid, ["a", "b", "c", "d"], expected=expected)
        assert written == Written(3, 1, {"b": 2, "c": NO_DOCUMENT})
        assert (await ledger.documents(books.uuid, ["a", "b"])).keys() == {"b"}

    async def test_one_of_many_conditional_writers_wins(self, ledger: Ledger, books: Collection) -> None:
        """When many expect one document at the same operation, one is stored and the others are told of it."""
        await ledger.append(books.uuid, [make_document("a")])
        outcomes = await asyncio.gather(
            *(ledger.append(books.uuid, [make_document("a", f"{n}")], expected={"a": 1}) for n in range(10))
        )
        assert sorted(outcome.changed for outcome in outcomes) == [0] * 9 + [1]
        assert all(outcome.conflicts == {"a": 2} for outcome in outcomes if not outcome.changed)

    async def test_a_receipt_is_kept_with_its_write(self, ledger: Ledger, books: Collection, reopen) -> None:
        """A receipt comes back with the number after its write; its key is refused again, and nothing is done then."""
        one, two = Receipt("key", b"asked\0", b"answer"), Receipt("other", b"asked", b"")
        assert await ledger.find_receipt(books.uuid, "key") is None
        await ledger.append(books.uuid, [make_document("a"), make_document("b")], receipt=one)
        await ledger.delete(books.uuid, ["a"], receipt=two)
        for current in (ledger, None):
            current = current or await reopen()
            assert await current.find_receipt(books.uuid, "key") == replace(one, seq=2)
            assert await current.find_receipt(books.uuid, "other") == replace(two, seq=3)
            for again in (
                current.append(books.uuid, [make_document("c")], receipt=one),
                current.delete(books.uuid, ["b"], receipt=one),
            ):
                with pytest.raises(Conflict, match="key"):
                    await again
            assert await current.state(books.uuid) == CollectionState(3, 1)

    async def test_a_refused_write_leaves_no_receipt(self, ledger: Ledger, books: Collection) -> None:
        """Neither a write that fails nor another collection's write takes a key; a conflicting one keeps its receipt."""
        receipt = Receipt("key", b"asked", b"answer")
        wrong = make_document("a", vector=np.ones(DIM + 1, dtype=np.float32))
        with pytest.raises(InvalidInput):
            await ledger.append(books.uuid, [wrong], receipt=receipt)
        assert await ledger.find_receipt(books.uuid, "key") is None
        films = make_collection("films")
        await ledger.create_collection(films)
        await ledger.append(films.uuid, [], receipt=receipt)
        written = await ledger.append(books.uuid, [make_document("a")], expected={"a": 3}, receipt=receipt)
        assert written == Written(0, 0, {"a": NO_DOCUMENT})
        assert await ledger.find_receipt(books.uuid, "key") == replace(receipt, seq=0)

    async def test_one_of_many_repeated_writes_is_done(self, ledger: Ledger, books: Collection) -> None:
        """When a write with one key comes many times at once, one is done and the others are conflicts."""
        receipt = Receipt("key", b"asked", b"answer")
        outcomes = await asyncio.gather(
            *(ledger.append(books.uuid, [make_document(f"d{n}")], receipt=receipt) for n in range(10)),
            return_exceptions=True,
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict"] * 9 + ["Written"]
        assert await ledger.state(books.uuid) == CollectionState(1, 1)

    async def test_trimming_forgets_deletions_only(self, ledger: Ledger, books: Collection) -> None:
        """Deletions up to a number leave the log, all else stays, and the state says up to where; ids come back new."""
        await ledger.append(books.uuid, [make_document(id_) for id_ in "abcd"])
        await ledger.delete(books.uuid, ["a", "b"])
        await ledger.delete(books.uuid, ["c"])
        assert await ledger.trim(books.uuid, 4) == 0
        assert await ledger.trim(books.uuid, 6) == 2
        assert await ledger.trim(books.uuid, 6) == 0
        assert [(op.seq, op.id) for op in await log(ledger, books)] == [(4, "d"), (7, "c")]
        assert await ledger.state(books.uuid) == CollectionState(7, 1, 6)
        assert (await ledger.append(books.uuid, [make_document("a")], expected={"a": NO_DOCUMENT})).seq == 8
        assert await ledger.trim(books.uuid, 1_000) == 1
        state = await ledger.state(books.uuid)
        assert (state.seq, state.documents) == (8, 2)
        assert 7 <= state.trimmed_seq <= 8
        assert await ledger.trim("nobody", 5) == 0

    # --- epochs and news

    async def test_history_is_shared_with_former_openings(self, ledger: Ledger, books: Collection, reopen) -> None:
        """What was read in an epoch up to a number that it had is this ledger's, also after it was opened again."""
        await ledger.append(books.uuid, [make_document("a"), make_document("b")])
        epoch = ledger.epoch
        for current in (ledger, None, None):
            current = current or await reopen()
            assert current.epoch
            for token in {epoch, current.epoch}:
                assert [await current.shares_history(books.uuid, token, seq) for seq in (0, 2, 3)] == [
                    True,
                    True,
                    False,
                ]
            assert not await current.shares_history(books.uuid, "an epoch of another ledger", 1)
            assert not await current.shares_history("nobody", epoch, 1)

    async def test_what_was_written_is_heard(self, ledger: Ledger, books: Collection, reopen) -> None:
        """The last number is known without asking after every write, and where exclusive after opening too."""
        assert ledger.heard_seq("nobody") == ledger.heard_seq(books.uuid) == 0
        await ledger.append(books.uuid, [make_document("a"), make_document("b")])
        assert ledger.heard_seq(books.uuid) == 2
        assert books.uuid in ledger.heard_collections()
        await ledger.delete(books.uuid, ["a"])
        assert ledger.heard_seq(books.uuid) == 3
        again = await reopen()
        assert again.heard_seq(books.uuid) == 3 or not again.exclusive
        await again.state(books.uuid)
        assert again.heard_seq(books.uuid) == 3

    async def test_waiting_for_news_ends(self, ledger: Ledger) -> None:
        """Waiting ends when its time is over, and when the ledger closes."""
        await asyncio.wait_for(ledger.wait_for_news(0.01), timeout=10)
        waiting = [asyncio.create_task(ledger.wait_for_news(1_000)) for _ in range(3)]
        await asyncio.sleep(0.01)
        await ledger.aclose()
        await asyncio.wait_for(asyncio.gather(*waiting), timeout=10)
        with pytest.raises(NotReady):
            await ledger.wait_for_news(0)
