"""What all shards propose together is what one shard with all the rows would."""

import random

from services.search.ports import Candidate, LexicalStatistics, RetrievalQuery, ShardAnswer
from services.search.shards.gathering import Gathered
from services.search.shards.merging import Counted, merged
from tests.shard_hosts import BOOKS

LIMIT = 20


def proposed(shards: int) -> set[str]:
    """Return what is proposed of the same 300 documents in so many shards, each proposing the best of its own."""
    rng = random.Random(4)
    rows = [(f"d{n}", rng.random(), rng.random() if rng.random() < 0.4 else None) for n in range(300)]
    answers = {}
    for shard in range(shards):
        own = [
            Candidate(id_, shard, n, dense, bm25) for n, (id_, dense, bm25) in enumerate(rows) if n % shards == shard
        ]
        by_dense = sorted(own, key=lambda one: one.dense, reverse=True)[:LIMIT]
        by_bm25 = sorted([one for one in own if one.bm25 is not None], key=lambda one: one.bm25, reverse=True)[:LIMIT]
        answers[shard] = ShardAnswer(shard, 1, list({one.id: one for one in (*by_dense, *by_bm25)}.values()))
    found = merged(
        BOOKS, RetrievalQuery(LIMIT), Counted(LexicalStatistics(300, {})), Gathered(answers, {}, frozenset()), {}, {}
    )
    return {candidate.id for candidate in found.candidates}


def test_more_shards_propose_no_more():
    """The best of each retriever's are the same whatever the number of shards."""
    assert LIMIT <= len(proposed(1)) <= 2 * LIMIT
    assert proposed(2) == proposed(8) == proposed(1)
