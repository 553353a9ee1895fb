"""
What terms were counted to be, kept while their collection does not move: it saves a round trip to every shard.

Nothing is guessed. Counts are kept only if all shards stood where they stood at the search before, so that they are of
that moment; and every search compares where the shards stood that answered it. Where they have moved on, its own answers
were scored with old counts: the router counts anew and searches again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from services.search.ports import LexicalStatistics

MOST_TERMS = 50_000  # of a collection
MOST_COLLECTIONS = 64
MOST_AGE_S = 10.0  # Segments are merged and ledgers restored without the operations' numbers telling.


@dataclass(slots=True)
class _Kept:
    """How far each shard was when the terms were counted."""

    since: float
    stood: Mapping[int, int]
    documents: int = 0
    doc_freq: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """Counts, and up to which operation each shard had applied what they count."""

    statistics: LexicalStatistics
    stood: Mapping[int, int]


class TermStatistics:
    """The counts of the collections searched lately. Used from one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[str, _Kept] = {}

    def find(self, uuid: str, terms: Sequence[str], seq: int) -> Known | None:
        """Return the counts of *terms* in a collection of which *seq* is known to be applied; None: count them."""
        kept = self._kept.get(uuid)
        if kept is None or not kept.doc_freq or self._clock() - kept.since > MOST_AGE_S:
            return None
        if min(kept.stood.values()) < seq:
            return None
        try:
            counted = LexicalStatistics(kept.documents, {term: kept.doc_freq[term] for term in terms})
        except KeyError:
            return None
        return Known(counted, kept.stood)

    def moved(self, uuid: str, known: Known, stand: Mapping[int, int]) -> bool:
        """Return whether shards that answered *stand* elsewhere than when *known* was counted; if so counts are dropped."""
        if all(known.stood.get(shard) == seq for shard, seq in stand.items()):
            return False
        self._kept.pop(uuid, None)
        return True

    def learn(self, uuid: str, counted: LexicalStatistics, stand: Mapping[int, int]) -> None:
        """Keep what all shards counted just before a search that all of them answered, and where they *stand*."""
        kept = self._kept.get(uuid)
        if kept is None or kept.stood != stand or self._clock() - kept.since > MOST_AGE_S:
            self._kept.pop(uuid, None)
            if len(self._kept) >= MOST_COLLECTIONS:
                del self._kept[next(iter(self._kept))]
            self._kept[uuid] = _Kept(self._clock(), dict(stand))
            return
        if kept.documents != counted.documents or len(kept.doc_freq) >= MOST_TERMS:
            kept.doc_freq.clear()
        kept.documents = counted.documents
        kept.doc_freq.update(counted.doc_freq)

    def forget(self, uuid: str) -> None:
        """Drop a collection."""
        self._kept.pop(uuid, None)
