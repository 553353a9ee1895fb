"""A deterministic scorer without weights: the share of the query's words that the document has."""

import re
from collections.abc import Sequence

from services.rerank.ports import Pair, PreparedPair, ScorerInfo


class FakeBackend:
    """Needs no model and scores in microseconds."""

    @property
    def info(self) -> ScorerInfo:
        """What this is."""
        return ScorerInfo(
            name="fake",
            kind="fake",
            score="share of the query's words that occur in the document",
            fingerprint="fake-rerank@1",
            max_tokens=1 << 20,
            runtime="python",
            precision="fp32",
        )

    def prepare(self, pairs: Sequence[Pair]) -> list[PreparedPair]:
        """See Backend."""
        prepared = []
        for pair in pairs:
            query, text = (set(re.findall(r"\w+", part.lower())) for part in pair)
            tokens = len(query) + len(text)
            prepared.append(PreparedPair(tokens, tokens, (query, text)))
        return prepared

    def score(self, batch: Sequence[PreparedPair]) -> list[float]:
        """See Backend."""
        return [len(query & text) / max(1, len(query)) for query, text in (pair.payload for pair in batch)]

    def to_probability(self, raw: float) -> float:
        """The share is one already."""
        return raw
