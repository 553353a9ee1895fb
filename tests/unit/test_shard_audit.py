"""The audit of a shard against the ledger: what it finds, what it mends, and what is no difference."""

import apsw
import numpy as np
import pytest
import pytest_asyncio

from services.search.shards.local import LocalShard
from tests.contract.shard_contract import (
    TINY,
    a_collection,
    dense,
    found,
    gone,
    lexical,
    put,
    shard_threads,
    unit,
)

OPERATIONS = [put(seq, f"d{seq}", f"apple word{seq}", vector=unit(1, seq), n=seq) for seq in range(1, 31)]


@pytest.fixture(scope="module")
def threads():
    """Return the threads that the shards of this file work in."""
    with shard_threads() as made:
        yield made


@pytest_asyncio.fixture
async def shard(tmp_path, threads):
    """Return a shard that has applied the operations."""
    shard = LocalShard.open(a_collection(), 0, tmp_path, threads=threads, vectors=TINY)
    await shard.apply(OPERATIONS, 30)
    yield shard
    await shard.aclose()


async def pages(operations, size=7):
    """Yield *operations* page by page."""
    for start in range(0, len(operations), size):
        yield operations[start : start + size]


def alter_store(directory, sql):
    """Run *sql* on the store, behind the shard's back."""
    connection = apsw.Connection(str(directory / "store.sqlite"))
    connection.execute(sql)
    connection.close()


async def audited(shard, operations=OPERATIONS, *, repair=False):
    """Return what an audit finds, and how many it mended."""
    report = await shard.audit(pages(operations), repair=repair)
    return {kind: sorted(ids) for kind, ids in report.differences.items()}, report.repaired


async def test_a_sound_shard_has_no_differences(shard):
    """Neither at once, nor after maintenance, nor for operations that it has not yet."""
    assert await audited(shard) == ({}, 0)
    while await shard.maintain(idle=True):
        pass
    assert await audited(shard) == ({}, 0)
    assert await audited(shard, [*OPERATIONS[:29], put(31, "d30", "newer"), gone(32, "d1")]) == ({}, 0)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("DELETE FROM documents WHERE id = 'd7'", "missing"),
        ("UPDATE documents SET text = 'other' WHERE id = 'd7'", "store"),
        ("UPDATE documents SET metadata = CAST('{\"n\":0}' AS BLOB) WHERE id = 'd7'", "store"),
        ("UPDATE documents SET seq = 2 WHERE id = 'd7'", "stale"),
    ],
)
async def test_what_the_store_lost_is_found_and_mended(shard, tmp_path, sql, kind):
    """A row that is gone, altered or old is named, put back from the ledger, and found by every index again."""
    alter_store(tmp_path, sql)
    assert await audited(shard) == ({kind: ["d7"]}, 0)
    differences, repaired = await audited(shard, repair=True)
    assert differences == {kind: ["d7"]}
    assert repaired >= 1
    assert await audited(shard) == ({}, 0)
    assert (await shard.fetch(["d7"]))["d7"].text == "apple word7"
    assert await found(shard, lexical("word7")) == ["d7"]
    assert await found(shard, dense(1, limit=100)) == sorted(operation.id for operation in OPERATIONS)
    assert shard.documents == 30


async def test_what_the_ledger_has_not_is_found_and_removed(shard):
    """A document that the ledger never had, and one that it has deleted, are surplus."""
    ledger = [operation for operation in OPERATIONS if operation.id not in ("d3", "d4")]
    ledger.append(gone(30, "d4"))
    assert await audited(shard, ledger) == ({"surplus": ["d3", "d4"]}, 0)
    assert await audited(shard, ledger, repair=True) == ({"surplus": ["d3", "d4"]}, 2)
    assert await audited(shard, ledger) == ({}, 0)
    assert sorted(await shard.fetch(["d3", "d4", "d5"])) == ["d5"]
    assert shard.documents == 28


async def test_another_vector_is_found_and_mended(shard):
    """Vectors are compared bit by bit."""
    vector = OPERATIONS[4].document.vector.copy()
    vector[0] = np.nextafter(vector[0], np.float32(2))
    ledger = [*OPERATIONS[:4], put(5, "d5", "apple word5", vector=vector, n=5), *OPERATIONS[5:]]
    assert await audited(shard, ledger, repair=True) == ({"vector": ["d5"]}, 1)
    assert await audited(shard, ledger) == ({}, 0)


async def test_words_and_attributes_that_are_missing_are_found_and_mended(tmp_path, threads):
    """A row that an index lost, while the store has it, is named and added again."""
    shard = LocalShard.open(a_collection(), 0, tmp_path, threads=threads, vectors=TINY)
    other = [put(seq, f"d{seq}", "pear", vector=unit(1, seq)) for seq in range(1, 4)]
    await shard.apply(other, 3)
    lost_words = put(2, "d2", "apple", vector=unit(1, 2))
    alter_store(tmp_path, "UPDATE documents SET text = 'apple' WHERE id = 'd2'")
    ledger = [other[0], lost_words, other[2]]
    assert await audited(shard, ledger, repair=True) == ({"lexical": ["d2"]}, 1)
    assert await found(shard, lexical("apple")) == ["d2"]
    lost_attribute = put(3, "d3", "pear", vector=unit(1, 3), x=1)
    alter_store(tmp_path, "UPDATE documents SET metadata = CAST('{\"x\":1}' AS BLOB) WHERE id = 'd3'")
    ledger = [other[0], lost_words, lost_attribute]
    assert await audited(shard, ledger, repair=True) == ({"attributes": ["d3"]}, 1)
    assert await found(shard, dense(1, filter={"x": 1})) == ["d3"]
    assert await audited(shard, ledger) == ({}, 0)
    await shard.aclose()


async def test_what_is_written_meanwhile_is_no_difference(shard, tmp_path):
    """Updates and deletions that come while the pages are read are neither reported nor undone."""
    alter_store(tmp_path, "UPDATE documents SET text = 'other' WHERE id IN ('d1', 'd2', 'd3')")

    async def moving_pages():
        async for page in pages(OPERATIONS):
            if page[0].seq == 1:
                await shard.apply([put(31, "d1", "newer"), gone(32, "d2"), gone(33, "d20")], 33)
            yield page

    report = await shard.audit(moving_pages(), repair=True)
    assert report.differences == {"store": ["d3"]}
    assert report.applied_seq == 33
    assert (await shard.fetch(["d1", "d2", "d20"])).keys() == {"d1"}
    assert await found(shard, lexical("newer")) == ["d1"]


async def test_what_was_mended_outlives_a_restart(shard, tmp_path, threads):
    """A snapshot after a repair has what was mended, though no operation came."""
    await shard.snapshot("e")
    alter_store(tmp_path, "DELETE FROM documents WHERE id = 'd7'")
    await audited(shard, repair=True)
    await shard.snapshot("e")
    await shard.aclose()
    again = LocalShard.open(a_collection(), 0, tmp_path, threads=threads, vectors=TINY)
    assert again.origin.seq == 30
    assert await audited(again) == ({}, 0)
    await again.aclose()
