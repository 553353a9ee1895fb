"""What every scorer must do, as tests: a subclass gives one as the fixture `scorer`."""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from services.rerank.ports import Backend, Window

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
LONG = "plants and energy " * 3000


def windows_of(scorer: Backend, query: str, texts: Sequence[str]) -> list[Window]:
    """Return the first window of each of *texts*: all of it, or as much as fits."""
    tokens = scorer.tokenize_query(query)
    room = scorer.room(tokens)
    return [Window(tokens, document, 0, min(len(document.ids), room)) for document in scorer.tokenize(texts)]


def score(scorer: Backend, query: str, texts: Sequence[str]) -> list[float]:
    """Return the raw scores of *texts*, computed as one batch."""
    return [scorer.relevance(row) for row in scorer.score(windows_of(scorer, query, texts))]


class RerankBackendContract:
    """Inherit this, and give the fixture `scorer`; *tolerance* is what company may change in a raw score."""

    tolerance = 1e-4

    def test_one_row_of_finite_numbers_a_window(self, scorer: Backend) -> None:
        """Each has its outputs, float32, and a score that is a plain float."""
        outputs = scorer.score(windows_of(scorer, QUERY, DOCUMENTS))
        assert outputs.dtype == np.float32
        assert outputs.shape == (len(DOCUMENTS), outputs.shape[1])
        assert np.isfinite(outputs).all()
        assert all(type(scorer.relevance(row)) is float for row in outputs)

    def test_order_is_kept_among_mixed_lengths(self, scorer: Backend) -> None:
        """A window's score does not depend on its company, nor on its place in the batch."""
        together = score(scorer, QUERY, DOCUMENTS)
        assert score(scorer, QUERY, DOCUMENTS[::-1])[::-1] == pytest.approx(together, abs=self.tolerance)
        alone = [score(scorer, QUERY, [text])[0] for text in DOCUMENTS]
        assert alone == pytest.approx(together, abs=self.tolerance)

    def test_it_is_deterministic(self, scorer: Backend) -> None:
        """The same batch again gives the same scores, whatever the scorer remembers of it."""
        first = score(scorer, QUERY, DOCUMENTS)
        assert score(scorer, QUERY, DOCUMENTS) == pytest.approx(first, abs=self.tolerance)

    def test_windows_of_several_queries_mix(self, scorer: Backend) -> None:
        """A batch may hold pairs of different callers."""
        queries = (QUERY, "What did the market do?")
        mixed = [
            one
            for pair in zip(*(windows_of(scorer, query, DOCUMENTS) for query in queries), strict=True)
            for one in pair
        ]
        apart = [score(scorer, query, [text])[0] for text in DOCUMENTS for query in queries]
        together = [scorer.relevance(row) for row in scorer.score(mixed)]
        assert together == pytest.approx(apart, abs=self.tolerance)

    @pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
    def test_any_document_has_a_score(self, scorer: Backend, text: str) -> None:
        """Empty documents, control characters and special tokens are scored; their pairs count tokens."""
        (window,) = windows_of(scorer, QUERY, [text])
        assert scorer.tokens(window) >= 1
        assert scorer.cost_tokens(window) >= 1
        assert np.isfinite(scorer.score([window])).all()

    def test_documents_are_tokenised_whole(self, scorer: Backend) -> None:
        """However long; what fits beside a query is within the limit, and is a third of it at least."""
        (document,) = scorer.tokenize([LONG])
        assert len(document.ids) >= 9000
        for query in ("plants", LONG):
            tokens = scorer.tokenize_query(query)
            room = scorer.room(tokens)
            assert scorer.info.max_tokens / 3 <= room < scorer.info.max_tokens
            window = Window(tokens, document, 0, room)
            assert scorer.cost_tokens(window) <= scorer.info.max_tokens
            assert np.isfinite(scorer.score([window])).all()

    def test_any_part_of_a_document_is_scored(self, scorer: Backend) -> None:
        """By its own tokens, wherever in the document they stand."""
        query = scorer.tokenize_query(QUERY)
        (document,) = scorer.tokenize([f"{DOCUMENTS[1]} {DOCUMENTS[0]} {DOCUMENTS[1]}"])
        size = len(document.ids) // 3
        parts = [Window(query, document, start, start + size) for start in (0, size, 0)]
        first, other, again = (scorer.relevance(row) for row in scorer.score(parts))
        assert first != pytest.approx(other, abs=1e-5)
        assert first == pytest.approx(again, abs=self.tolerance)

    def test_a_long_query_is_cut_and_says_so(self, scorer: Backend) -> None:
        """Over half of what is read; a short one is not."""
        cut = scorer.tokenize_query(LONG)
        assert cut.cut
        assert len(cut.ids) <= scorer.info.max_tokens / 2
        assert not scorer.tokenize_query(QUERY).cut

    def test_offsets_lead_back_to_the_text(self, scorer: Backend) -> None:
        """Each token's characters lie within the text, in order; unless the tokenizer knows none."""
        for text, document in zip(DOCUMENTS, scorer.tokenize(DOCUMENTS), strict=True):
            if document.offsets is None:
                continue
            assert document.offsets.shape == (len(document.ids), 2)
            starts, ends = document.offsets.T
            assert (np.diff(starts) >= 0).all()
            assert ((starts >= 0) & (starts <= ends) & (ends <= len(text))).all()

    def test_a_key_stands_for_a_text(self, scorer: Backend) -> None:
        """The same again for the same text, another for another."""
        keys = [document.key for document in scorer.tokenize([*DOCUMENTS, *ODD_TEXTS])]
        assert len(set(keys)) == len(keys)
        assert [document.key for document in scorer.tokenize(DOCUMENTS)] == keys[: len(DOCUMENTS)]
        assert scorer.tokenize_query(QUERY).key != scorer.tokenize_query("other").key

    def test_threads_may_tokenise_at_once(self, scorer: Backend) -> None:
        """Each gets what one alone gets."""
        expected = [document.ids.tolist() for document in scorer.tokenize(DOCUMENTS)]
        query = scorer.tokenize_query(LONG).ids.tolist()
        barrier = threading.Barrier(4)

        def tokenize(_: int) -> bool:
            barrier.wait(10)
            return all(
                [document.ids.tolist() for document in scorer.tokenize(DOCUMENTS)] == expected
                and scorer.tokenize_query(LONG).ids.tolist() == query
                for _ in range(10)
            )

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(tokenize, range(4)))

    def test_probabilities_keep_the_order(self, scorer: Backend) -> None:
        """Finished scores are from 0 to 1 and rise with the raw ones."""
        raw = sorted({*score(scorer, QUERY, DOCUMENTS)})
        finished = [scorer.to_probability(one) for one in raw]
        assert all(math.isfinite(one) and 0.0 <= one <= 1.0 for one in finished)
        assert finished == sorted(finished)
        assert len(set(finished)) == len(raw)

    def test_it_says_what_it_is(self, scorer: Backend) -> None:
        """Name, kind, fingerprint and what a score is made of are told."""
        info = scorer.info
        assert all((info.name, info.kind, info.score, info.fingerprint, info.runtime, info.precision))
        assert info.max_tokens > 0
        assert info.ranks
