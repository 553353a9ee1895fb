"""A shard whose words cannot be searched: its vectors answer alone, where the question has one."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.common.errors import BackendFailed, InvalidInput
from services.search.filters import parse_filter
from services.search.ports import LexicalStatistics, ShardQuery
from services.search.shards.lexical import LexicalView
from services.search.shards.local import LocalShard
from tests.contract.shard_contract import TINY, a_collection, put, shard_threads, unit


class BrokenWords(LexicalView):
    """Words whose index raises at every touch."""

    def __init__(self, error: Exception) -> None:
        super().__init__([], "english")
        self._error = error

    @property
    def num_docs(self) -> int:
        raise self._error

    def search(self, *args, **kwargs):
        raise self._error


@pytest.fixture
async def shard(tmp_path) -> AsyncIterator[LocalShard]:
    with shard_threads() as threads:
        opened = LocalShard.open(a_collection(), 0, tmp_path, threads=threads, vectors=TINY)
        await opened.apply([put(seq, f"d{seq}", "red fox", vector=unit(seq), parity=seq % 2) for seq in range(1, 7)], 6)
        yield opened
        await opened.aclose()


def hurt(shard: LocalShard, error: Exception) -> None:
    contents = shard._contents
    contents.view = replace(contents.view, lexical=BrokenWords(error))


HYBRID = ShardQuery(3, vector=unit(2), terms=["red"], statistics=LexicalStatistics(6, {"red": 6}))


async def test_the_vectors_answer_alone_and_the_answer_says_so(shard) -> None:
    """With the same candidates, filter and facets as if the question had no words."""
    assert not (await shard.search(HYBRID)).lexical_failed
    hurt(shard, OSError("a segment is gone"))
    asked = {"filter": parse_filter({"parity": 0}), "facets": {"parity": 5}}
    answer = await shard.search(replace(HYBRID, **asked))
    alone = await shard.search(ShardQuery(3, vector=unit(2), **asked))
    assert answer.lexical_failed
    assert not alone.lexical_failed
    assert (answer.candidates, answer.facets) == (alone.candidates, alone.facets)
    assert {candidate.id for candidate in answer.candidates} == {"d2", "d4", "d6"}


async def test_without_a_vector_the_shard_fails(shard) -> None:
    """There is nothing left to answer with."""
    hurt(shard, OSError("a segment is gone"))
    with pytest.raises(BackendFailed):
        await shard.search(ShardQuery(3, terms=["red"]))


async def test_a_question_that_is_at_fault_is_no_failure(shard) -> None:
    """It is the caller's to mend."""
    hurt(shard, InvalidInput("too many words"))
    with pytest.raises(InvalidInput):
        await shard.search(HYBRID)


async def test_counting_words_that_cannot_be_read_counts_nothing(shard) -> None:
    """So that the search comes to be, and finds out itself."""
    assert (await shard.statistics(["red"])).doc_freq == {"red": 6}
    hurt(shard, OSError("a segment is gone"))
    assert await shard.statistics(["red"]) == LexicalStatistics(0, {})
