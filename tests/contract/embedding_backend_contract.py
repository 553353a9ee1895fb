"""What every embedding backend must do, as tests: a subclass gives one as the fixture `backend`."""

import numpy as np
import pytest

from services.embedding.ports import Backend

TEXTS = (
    "A short question?",
    "The quick brown fox jumps over the lazy dog, and then it does so again, for the dog has not moved at all.",
    "one",
    "Naïve café, 東京, Москва, العربية, 🙂👩‍👩‍👧 and 12,345.67 €",
    "word " * 120,
    "Tabs\tand\nnew lines\r\nin between",
    "x",
)
ODD_TEXTS = (
    "",
    " ",
    "\n\t",
    "!",
    "…",
    "\u200b",
    "\u0301",
    "\ufeff",
    "\U0010ffff",
    "a\u0000b",
    "<script>",
    "[CLS] [SEP] [PAD]",
    "e" * 5000,
)


class EmbeddingBackendContract:
    """Inherit this, and give the fixture `backend`."""

    @staticmethod
    def embed(backend: Backend, texts: tuple[str, ...] | list[str]) -> np.ndarray:
        """Return the vectors of *texts*, computed as one batch."""
        return backend.forward(backend.tokenize(texts))

    def test_vectors_are_float32_of_the_stated_dimension(self, backend: Backend) -> None:
        """A batch gives one row a text, float32, as wide as the model's information says."""
        vectors = self.embed(backend, TEXTS)
        assert vectors.shape == (len(TEXTS), backend.info.dim)
        assert vectors.dtype == np.float32
        assert np.isfinite(vectors).all()

    def test_order_is_kept_among_mixed_lengths(self, backend: Backend) -> None:
        """A text's vector does not depend on its company, nor on its place in the batch."""
        together = self.embed(backend, TEXTS)
        backwards = self.embed(backend, TEXTS[::-1])[::-1]
        for text, row, other in zip(TEXTS, together, backwards, strict=True):
            alone = self.embed(backend, [text])[0]
            assert alone == pytest.approx(row, abs=1e-5)
            assert alone == pytest.approx(other, abs=1e-5)

    def test_it_is_deterministic(self, backend: Backend) -> None:
        """The same batch twice gives the same numbers."""
        assert np.array_equal(self.embed(backend, TEXTS), self.embed(backend, TEXTS))

    def test_different_texts_differ(self, backend: Backend) -> None:
        """Texts without a word in common have different vectors, and the nearest to a text is itself."""
        vectors = self.embed(backend, TEXTS)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.argmax(unit @ unit.T, axis=1).tolist() == list(range(len(TEXTS)))

    def test_a_cut_text_is_flagged(self, backend: Backend) -> None:
        """A text over the limit is cut to it and flagged; others are not."""
        limit = backend.info.max_tokens
        short, long = backend.tokenize(["short text", "word " * (limit * 2)])
        assert (short.truncated, long.truncated) == (False, True)
        assert len(long.ids) == limit
        assert 0 < len(short.ids) < limit

    def test_what_was_cut_does_not_count(self, backend: Backend) -> None:
        """Beyond the limit a text may go on as it likes: the vector is that of its beginning."""
        head = "word " * backend.info.max_tokens
        one, other = self.embed(backend, [head + "this", head + "that"])
        assert np.array_equal(one, other)

    @pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
    def test_any_text_has_a_vector(self, backend: Backend, text: str) -> None:
        """Nearly empty texts, control characters and special tokens give finite vectors with a direction."""
        (row,) = self.embed(backend, [text])
        assert np.isfinite(row).all()
        assert np.linalg.norm(row) > 1e-6

    def test_odd_texts_harm_no_others(self, backend: Backend) -> None:
        """In a batch with odd texts the others have the vectors they always have."""
        mixed = self.embed(backend, [*ODD_TEXTS, TEXTS[0]])
        assert mixed[-1] == pytest.approx(self.embed(backend, [TEXTS[0]])[0], abs=1e-5)

    def test_it_says_what_it_is(self, backend: Backend) -> None:
        """Name, fingerprint, runtime and precision are told, with the reason for the precision."""
        info = backend.info
        assert all((info.name, info.fingerprint, info.runtime, info.precision_reason))
        assert info.precision in ("fp32", "bf16")
        assert info.dim > 0
        assert info.max_tokens > 0
