"""What every scorer must do, as tests: a subclass gives one as the fixture `scorer`."""

import math
from collections.abc import Sequence

import pytest

from services.common.errors import InvalidInput
from services.rerank.ports import Backend, Pair

QUERY = "How do plants turn sunlight into energy?"
DOCUMENTS = (
    "Photosynthesis: plants turn sunlight into chemical energy, in chloroplasts.",
    "The stock market fell sharply on Monday.",
    "Plants.",
    "Naïve café, 東京, Москва, 🙂 and 12,345.67 €",
    "A long text about gardens and plants. " * 40,
    "energy sunlight plants turn how",
)
ODD_TEXTS = ("", " ", "\n", "!", "\u200b", "\U0010ffff", "a\u0000b", "[SEP] [CLS]", "e" * 5000)


class RerankBackendContract:
    """Inherit this, and give the fixture `scorer`; set *cuts_queries* where no query is too long."""

    any_query_fits = False
    tolerance = 1e-4

    @staticmethod
    def score(scorer: Backend, query: str, texts: Sequence[str]) -> list[float]:
        """Return the raw scores of *texts*, computed as one batch."""
        return scorer.score(scorer.prepare([Pair(query, text) for text in texts]))

    def test_one_finite_number_a_pair(self, scorer: Backend) -> None:
        """Each pair has a score, a plain float."""
        scores = self.score(scorer, QUERY, DOCUMENTS)
        assert len(scores) == len(DOCUMENTS)
        assert all(type(score) is float and math.isfinite(score) for score in scores)

    def test_order_is_kept_among_mixed_lengths(self, scorer: Backend) -> None:
        """A pair's score does not depend on its company, nor on its place in the batch."""
        together = self.score(scorer, QUERY, DOCUMENTS)
        assert self.score(scorer, QUERY, DOCUMENTS[::-1])[::-1] == pytest.approx(together, abs=self.tolerance)
        alone = [self.score(scorer, QUERY, [text])[0] for text in DOCUMENTS]
        assert alone == pytest.approx(together, abs=self.tolerance)

    def test_it_is_deterministic(self, scorer: Backend) -> None:
        """The same batch again gives the same scores, whatever the scorer remembers of it."""
        first = self.score(scorer, QUERY, DOCUMENTS)
        assert self.score(scorer, QUERY, DOCUMENTS) == pytest.approx(first, abs=self.tolerance)

    def test_pairs_of_several_queries_mix(self, scorer: Backend) -> None:
        """A batch may hold pairs of different callers."""
        pairs = [Pair(query, text) for text in DOCUMENTS for query in (QUERY, "What did the market do?")]
        mixed = scorer.score(scorer.prepare(pairs))
        apart = [scorer.score(scorer.prepare([pair]))[0] for pair in pairs]
        assert mixed == pytest.approx(apart, abs=self.tolerance)

    @pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
    def test_any_document_has_a_score(self, scorer: Backend, text: str) -> None:
        """Empty documents, control characters and special tokens are scored; their pairs count tokens."""
        pairs = scorer.prepare([Pair(QUERY, text)])
        assert pairs[0].tokens >= 1
        assert pairs[0].cost_tokens >= 1
        assert all(math.isfinite(score) for score in scorer.score(pairs))

    def test_documents_are_cut_to_the_limit(self, scorer: Backend) -> None:
        """A document of any length is scored, by its beginning."""
        long = "plants and energy " * 3000
        pairs = scorer.prepare([Pair(QUERY, long)])
        assert pairs[0].cost_tokens <= scorer.info.max_tokens
        assert math.isfinite(scorer.score(pairs)[0])

    def test_a_query_is_never_cut(self, scorer: Backend) -> None:
        """A query that leaves no room is refused, naming the field, rather than read in part."""
        query = "sunlight " * 2000
        if self.any_query_fits:
            assert math.isfinite(self.score(scorer, query, ["sunlight"])[0])
            return
        with pytest.raises(InvalidInput, match="query") as caught:
            scorer.prepare([Pair(QUERY, "fine"), Pair(query, "text")])
        assert caught.value.param == "query"

    def test_probabilities_keep_the_order(self, scorer: Backend) -> None:
        """Finished scores are from 0 to 1 and rise with the raw ones."""
        raw = sorted({*self.score(scorer, QUERY, DOCUMENTS)})
        finished = [scorer.to_probability(score) for score in raw]
        assert all(0.0 <= score <= 1.0 for score in finished)
        assert finished == sorted(finished)
        assert len(set(finished)) == len(raw)

    def test_it_says_what_it_is(self, scorer: Backend) -> None:
        """Name, kind, fingerprint and what a score is made of are told."""
        info = scorer.info
        assert all((info.name, info.kind, info.score, info.fingerprint, info.runtime, info.precision))
        assert info.max_tokens > 0
