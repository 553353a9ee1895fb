"""From what each shard said to what the collection has: pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from services.search.ports import (
    Candidate,
    Collection,
    LexicalStatistics,
    RetrievalQuery,
    Retrieved,
    ShardAnswer,
    ShardCall,
)
from services.search.shards.gathering import Gathered


@dataclass(frozen=True, slots=True)
class Counted:
    """
    The statistics of the shards that gave them, and which shards are *left_out* of the search after that.

    *refused* says why some of those failed; the others are *late*. *whole* says that every shard counted something.
    """

    statistics: LexicalStatistics | None
    refused: Mapping[int, str] = field(default_factory=dict)
    late: frozenset[int] = frozenset()
    whole: bool = False

    @property
    def left_out(self) -> set[int]:
        """The numbers of the shards that are not asked any more."""
        return {*self.refused, *self.late}


_BY_DENSE, _BY_BM25 = attrgetter("dense", "id"), attrgetter("bm25", "id")

NOTHING = Counted(None)  # where there are no words to count


def add_up(collection: Collection, gathered: Gathered[LexicalStatistics]) -> Counted:
    """
    Add up what the shards counted.

    A shard whose hosts were all paused is not left out: it costs nothing to ask whether they still are. Nor are those
    that are late where all are: they may be opening the collection.
    """
    answers = gathered.answers
    return Counted(
        statistics=sum(answers.values(), LexicalStatistics(0, {})),
        refused={shard: failure for shard, failure in gathered.failures.items() if shard not in gathered.paused},
        late=gathered.late if answers else frozenset(),
        whole=len(answers) == collection.shards and all(answer.documents for answer in answers.values()),
    )


def stands(gathered: Gathered[ShardAnswer]) -> dict[int, int]:
    """Return up to which operation each shard answered, of those that have applied what they should have."""
    return {
        shard: answer.applied_seq
        for shard, answer in gathered.answers.items()
        if not (answer.fallback or answer.catching_up)
    }


def is_whole(collection: Collection, gathered: Gathered[ShardAnswer]) -> bool:
    """Return whether all shards answered, themselves, with all they have."""
    return len(gathered.answers) == collection.shards and not any(
        answer.fallback or answer.catching_up or answer.lexical_failed for answer in gathered.answers.values()
    )


def merged(
    collection: Collection,
    query: RetrievalQuery,
    counted: Counted,
    gathered: Gathered[ShardAnswer],
    calls: Mapping[int, ShardCall],
    timings_ms: dict[str, float],
) -> Retrieved:
    """Return all shards' answers as one; a stage took as long as in the slowest shard, added to *timings_ms*."""
    answers = gathered.answers.values()
    for answer in answers:
        for stage, spent in answer.timings_ms.items():
            timings_ms[stage] = max(spent, timings_ms.get(stage, 0.0))
    return Retrieved(
        candidates=_proposed(query, [candidate for answer in answers for candidate in answer.candidates]),
        total=collection.shards,
        ok=len(answers),
        catching_up=sum(answer.catching_up for answer in answers),
        failures={**counted.refused, **gathered.failures},
        timed_out=len(counted.late | gathered.late),
        as_of=min((answer.applied_seq for answer in answers), default=0),
        timings_ms=timings_ms,
        statistics=counted.statistics,
        fallback=sum(answer.fallback for answer in answers),
        breaker_open=len(gathered.paused),
        lexical_failed=sum(answer.lexical_failed for answer in answers),
        plans={number: answer.plan for number, answer in gathered.answers.items() if answer.plan is not None},
        calls={number: call for number, call in calls.items() if number in gathered.answers},
        facets=_facets(query, [answer.facets for answer in answers]) if query.facets else {},
    )


def _proposed(query: RetrievalQuery, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """
    Return the candidates that one shard with all the rows would propose: the best *limit* of each retriever's.

    Otherwise more shards would propose more, and scores that are standardised over what is proposed would differ with them.
    """
    if len(candidates) <= query.limit:
        return candidates
    dense = sorted([one for one in candidates if one.dense is not None], key=_BY_DENSE, reverse=True)
    bm25 = sorted([one for one in candidates if one.bm25 is not None], key=_BY_BM25, reverse=True)
    chosen = {one.id for one in (*dense[: query.limit], *bm25[: query.limit])}
    return [candidate for candidate in candidates if candidate.id in chosen]


def _facets(query: RetrievalQuery, parts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Add up the shards' counts and return, for each field, the commonest values first, ties by value."""
    merged: dict[str, dict[str, int]] = {}
    for field_name, limit in query.facets.items():
        counts: dict[str, int] = {}
        for part in parts:
            for value, count in part.get(field_name, {}).items():
                counts[value] = counts.get(value, 0) + count
        merged[field_name] = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:limit])
    return merged
