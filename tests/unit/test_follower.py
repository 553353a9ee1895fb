"""The follower over shards that are dictionaries, and a ledger that goes away, is trimmed, and is restored."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from services.common.errors import BackendFailed, NotFound, NotReady
from services.search.shards import follower as follower_module
from services.search.shards.follower import PAGE, Follower
from services.search.shards.slices import shard_of
from tests.shard_hosts import BOOKS, MemoryDirectory, MemoryLedger, Origin, eventually, many


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger(BOOKS)


@pytest.fixture
def directory() -> MemoryDirectory:
    return MemoryDirectory()


@pytest.fixture
async def follower(ledger, directory) -> AsyncIterator[Follower]:
    made = Follower(ledger, BOOKS, range(4), directory.open, poll_s=0.03)
    yield made
    await made.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def quick_retries(monkeypatch) -> None:
    monkeypatch.setattr(follower_module, "FIRST_RETRY_S", 0.01)


async def applied(follower: Follower, seq: int, timeout_s: float = 5.0) -> bool:
    """Wait until every shard has applied *seq*."""
    waiting = (follower.wait_applied(number, seq, timeout_s) for number in follower.slots)
    return all(await asyncio.gather(*waiting))


def behind(follower: Follower) -> list[bool]:
    return [slot.catching_up for slot in follower.slots.values()]


def texts(directory: MemoryDirectory) -> dict[str, str]:
    return {id_: document.text for shard in directory.of(BOOKS) for id_, (_, document) in shard.live.items()}


def test_placement_never_changes() -> None:
    """The shard of an id is the same in every version: documents would be lost otherwise."""
    assert [shard_of(id_, 8) for id_ in ("", "a", "doc-1", "\U0001f600")] == [4, 0, 6, 5]


def test_placement_is_even() -> None:
    """Ids spread over all shards, none more than a tenth above its share."""
    for shards in (1, 3, 8):
        counts = Counter(shard_of(f"document {n}", shards) for n in range(20_000))
        assert set(counts) == set(range(shards))
        assert max(counts.values()) < 20_000 / shards * 1.1


async def test_every_document_is_on_its_shard(ledger, directory, follower) -> None:
    """All operations of a long log arrive, each on the shard of its id, and every shard stands at the end."""
    seq = ledger.write(BOOKS, **many(2 * PAGE + 7))
    await follower.open()
    assert await applied(follower, seq)
    for shard in directory.of(BOOKS):
        assert set(shard.live) == {id_ for id_ in many(2 * PAGE + 7) if shard_of(id_, 4) == shard.number}
        assert shard.applied_seq == seq


async def test_only_the_shards_of_this_node_are_opened(ledger, directory) -> None:
    """A node with shards 1 and 3 opens and feeds those; another one is not ready, and the message says why."""
    follower = Follower(ledger, BOOKS, (1, 3), directory.open, poll_s=0.03)
    seq = ledger.write(BOOKS, **many(20))
    await follower.open()
    assert await applied(follower, seq)
    assert {id_ for _, id_ in directory.opened} == {1, 3}
    with pytest.raises(NotReady, match=r"Shard 2 .* is not on this node: it has 1, 3"):
        follower.shard(2)
    with pytest.raises(NotReady):
        await follower.wait_applied(2, 1, 0.1)
    await follower.aclose()


async def test_updates_and_deletions_follow(ledger, directory, follower) -> None:
    """After the ledger's last operation is applied, the new text is there and the deleted document is not."""
    await follower.open()
    await applied(follower, ledger.write(BOOKS, a="old", b="old"))
    seq = ledger.write(BOOKS, a="new", b=None)
    follower.notify(seq)
    assert await applied(follower, seq)
    assert texts(directory) == {"a": "new"}


async def test_a_notice_is_acted_on_at_once(ledger, directory) -> None:
    """With polls an hour apart a notified write is applied at once, and nothing is read without one."""
    follower = Follower(ledger, BOOKS, range(4), directory.open, poll_s=3600)
    await follower.open()
    await asyncio.sleep(0.02)
    before = ledger.reads
    seq = ledger.write(BOOKS, a="word")
    await asyncio.sleep(0.02)
    assert ledger.reads == before
    follower.notify(seq)
    await eventually(lambda: follower.applied_seq == seq)
    await follower.aclose()


async def test_without_a_notice_the_poll_finds_it(ledger, directory, follower) -> None:
    """A write that nobody announces is applied at the next poll."""
    await follower.open()
    seq = ledger.write(BOOKS, a="word")
    await eventually(lambda: follower.applied_seq == seq)
    assert texts(directory) == {"a": "word"}


async def test_an_exclusive_ledger_is_not_asked_for_what_cannot_be_new(ledger, follower) -> None:
    """Once all is applied, polls cost the database of an embedded ledger nothing."""
    await follower.open()
    assert await applied(follower, ledger.write(BOOKS, a="word"))
    await asyncio.sleep(0.05)
    ledger.down = True
    await asyncio.sleep(0.1)
    assert follower._ledger_failures == 0


async def test_waiting_ends_with_the_deadline(ledger, follower) -> None:
    """Waiting for an operation that never comes returns False in time, and at closing."""
    await follower.open()
    assert await follower.wait_applied(0, 99, 0.05) is False
    waiting = asyncio.create_task(follower.wait_applied(0, 99, None))
    await asyncio.sleep(0)
    await follower.aclose()
    assert await waiting is False


async def test_shards_catch_up_while_they_answer(ledger, directory, follower) -> None:
    """A shard behind the ledger as it was at opening is catching up until it is there; a little later lag is not."""
    gate = asyncio.Event()
    directory.prepare = lambda shard: setattr(shard, "apply_gate", gate)
    ledger.write(BOOKS, **many(20))
    await follower.open()
    assert behind(follower) == [True] * 4
    gate.set()
    await applied(follower, 20)
    assert behind(follower) == [False] * 4
    gate.clear()
    ledger.write(BOOKS, new="word")
    await asyncio.sleep(0.1)
    assert behind(follower) == [False] * 4
    gate.set()


async def test_a_shard_that_is_far_behind_is_catching_up(ledger, directory, follower, monkeypatch) -> None:
    """One that lacks very many operations is flagged, however it came to lack them."""
    monkeypatch.setattr(follower_module, "FAR_BEHIND", 50)
    await follower.open()
    await applied(follower, ledger.write(BOOKS, a="word"))
    gate = asyncio.Event()
    for shard in directory.of(BOOKS):
        shard.apply_gate = gate
    seq = ledger.write(BOOKS, **many(100))
    await eventually(lambda: all(behind(follower)))
    gate.set()
    assert await applied(follower, seq)
    assert not any(behind(follower))


@pytest.mark.usefixtures("quick_retries")
async def test_a_failing_apply_is_reported_and_recovers(ledger, directory, follower) -> None:
    """One shard that cannot apply says why and is catching up, and gets there later; the others go on."""
    await follower.open()
    await applied(follower, ledger.write(BOOKS, **many(20)))
    bad = directory.of(BOOKS)[2]
    bad.apply_error = BackendFailed("the index is broken")
    seq = ledger.write(BOOKS, **many(40, "newer"))
    assert await applied(follower, seq, 0.1) is False
    await eventually(lambda: [shard.applied_seq for shard in directory.of(BOOKS)] == [seq, seq, 20, seq])
    standing = follower.slots[2].standing()
    assert "the index is broken" in (standing.failure or "")
    assert behind(follower) == [False, False, True, False]
    bad.apply_error = None
    assert await applied(follower, seq)
    assert not any(behind(follower))


@pytest.mark.usefixtures("quick_retries")
async def test_retries_grow_rarer(ledger, directory, follower) -> None:
    """A shard that keeps failing is tried again with pauses that double, not in a loop."""
    error = BackendFailed("broken")
    directory.prepare = lambda shard: setattr(shard, "apply_error", error if shard.number == 0 else None)
    ledger.write(BOOKS, **many(PAGE + 1))
    await follower.open()
    tries = directory.of(BOOKS)[0].applied_at
    await eventually(lambda: len(tries) >= 6)
    pauses = [after - before for before, after in pairwise(tries[:6])]
    assert all(pause > 0.9 * 0.01 * 2**turn for turn, pause in enumerate(pauses))


async def test_a_hanging_apply_does_not_hold_the_others(ledger, directory, follower, monkeypatch) -> None:
    """While one shard's apply hangs the others take later operations, and it meets them again when it is done."""
    monkeypatch.setattr(follower_module, "PATIENCE_S", 0.05)
    await follower.open()
    gate = directory.of(BOOKS)[1].apply_gate = asyncio.Event()
    ledger.write(BOOKS, **many(20))
    await asyncio.sleep(0.1)
    seq = ledger.write(BOOKS, **many(40, "newer"))
    await eventually(lambda: [shard.applied_seq for shard in directory.of(BOOKS)] == [seq, 0, seq, seq])
    gate.set()
    assert await applied(follower, seq)


@pytest.mark.usefixtures("quick_retries")
async def test_a_shard_that_cannot_be_opened_is_tried_again(ledger, directory, follower) -> None:
    """It is not ready and says why, the others answer, and once it can be opened it catches up."""
    directory.refuse = {3}
    seq = ledger.write(BOOKS, **many(20))
    await follower.open()
    with pytest.raises(NotReady, match="OSError"):
        follower.shard(3)
    assert follower.shard(0).number == 0
    directory.refuse = set()
    assert await applied(follower, seq)


@pytest.mark.usefixtures("quick_retries")
async def test_a_ledger_that_is_away_comes_back(ledger, directory, follower) -> None:
    """Without the ledger shards open and answer, as catching up; they follow once it is there."""
    seq = ledger.write(BOOKS, a="word")
    ledger.down = True
    await follower.open()
    assert behind(follower) == [True] * 4
    assert follower.shard(0).documents == 0
    ledger.down = False
    assert await applied(follower, seq)


async def test_a_deleted_collection_is_noticed(ledger, directory) -> None:
    """At opening it raises; later the owner is told."""
    gone = asyncio.Event()
    follower = Follower(ledger, BOOKS, range(4), directory.open, poll_s=0.01, gone=gone.set)
    await follower.open()
    ledger.exclusive = False
    ledger.remove(BOOKS)
    await asyncio.wait_for(gone.wait(), 5)
    await follower.aclose()
    with pytest.raises(NotFound):
        await Follower(ledger, BOOKS, range(4), directory.open, poll_s=0.01).open()
    assert all(shard.closed for shard in directory.of(BOOKS))


# --- histories that part


async def test_a_snapshot_of_this_history_is_followed_from_where_it_stands(ledger, directory, follower) -> None:
    """Nothing before the snapshot is read again, also when the ledger was opened again meanwhile."""
    await applied_and_kept(ledger, directory, **many(40))
    ledger.restore(BOOKS, 40)
    seq = ledger.write(BOOKS, new="word")
    ledger.read_after.clear()
    await follower.open()
    assert await applied(follower, seq)
    assert set(ledger.read_after) == {40}
    assert len(texts(directory)) == 41


async def test_a_snapshot_of_another_history_is_not_used(ledger, directory, follower) -> None:
    """A ledger restored to before the snapshot: the shards begin again, and are flagged until they are there."""
    await applied_and_kept(ledger, directory, **many(40))
    ledger.restore(BOOKS, 30)
    seq = ledger.write(BOOKS, d35="other")
    await follower.open()
    assert behind(follower) == [True] * 4
    assert await applied_anew(directory, follower, seq)
    assert texts(directory) == {**many(30), "d35": "other"}
    assert not any(behind(follower))


async def test_a_restore_is_noticed_while_following(ledger, directory, follower) -> None:
    """The shared ledger is set back and goes on further than before: what was derived from the lost part goes."""
    ledger.exclusive = False
    await follower.open()
    await applied(follower, ledger.write(BOOKS, **many(40)))
    old = directory.of(BOOKS)
    ledger.restore(BOOKS, 30)
    seq = ledger.write(BOOKS, **{f"e{number}": "other" for number in range(20)})
    await eventually(lambda: all(shard.closed for shard in old))
    assert await applied_anew(directory, follower, seq)
    assert set(texts(directory)) == {*many(30), *(f"e{number}" for number in range(20))}


async def test_a_failover_that_lost_nothing_costs_nothing(ledger, directory, follower) -> None:
    """Another epoch with the same history: no shard begins again."""
    ledger.exclusive = False
    await follower.open()
    await applied(follower, ledger.write(BOOKS, **many(40)))
    ledger.restore(BOOKS, 40)
    seq = ledger.write(BOOKS, new="word")
    assert await applied(follower, seq)
    assert len(directory.openings) == 4


async def test_a_ledger_that_forgot_deletions_makes_shards_begin_again(ledger, directory, follower) -> None:
    """A snapshot from before the trim point would keep what was deleted."""
    await applied_and_kept(ledger, directory, **many(10))
    seq = ledger.write(BOOKS, d3=None, new="word")
    await ledger.trim(BOOKS.uuid, 11)
    await follower.open()
    assert await applied_anew(directory, follower, seq)
    assert set(texts(directory)) == {*many(10), "new"} - {"d3"}


async def test_deletions_forgotten_at_the_end_do_not_stop_a_new_shard(ledger, directory, follower) -> None:
    """The last operation was a deletion that is gone from the log: an empty follower still gets to its number."""
    seq = ledger.write(BOOKS, a="word", b="word")
    seq = ledger.write(BOOKS, b=None)
    await ledger.trim(BOOKS.uuid, seq)
    await follower.open()
    assert await applied(follower, seq)
    assert set(texts(directory)) == {"a"}


async def applied_and_kept(ledger, directory, **documents: str) -> None:
    """Let a follower apply *documents* and leave snapshots."""
    seq = ledger.write(BOOKS, **documents)
    follower = Follower(ledger, BOOKS, range(4), directory.open, poll_s=0.03)
    await follower.open()
    assert await applied(follower, seq)
    for shard in directory.of(BOOKS):
        await shard.snapshot(ledger.epoch)
    await follower.aclose()
    assert directory.kept[BOOKS.uuid][0].origin == Origin(ledger.epoch, seq)


async def applied_anew(directory: MemoryDirectory, follower: Follower, seq: int) -> bool:
    """Wait until shards that began from nothing have applied *seq*."""
    began = time.monotonic()
    while time.monotonic() - began < 5:
        if all(shard.origin is None and not shard.closed for shard in directory.of(BOOKS)):
            return await applied(follower, seq)
        await asyncio.sleep(0.005)
    return False
