"""What every embedding backend must do, as tests: a subclass gives one as the fixture `backend`."""

import numpy as np
import pytest

from services.common.tokens import Tokens
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
    """
    Inherit this, and give the fixture `backend`.

    *tolerance* is how far a vector's components, at unit length, may move with the company it is computed in.
    """

    tolerance = 1e-5

    @staticmethod
    def embed(backend: Backend, texts: tuple[str, ...] | list[str]) -> np.ndarray:
        """Return the vectors of *texts*, computed as one batch."""
        return backend.forward(backend.tokenize(texts))

    def near(self, vector: np.ndarray) -> object:
        """Return what equals *vector* to the tolerance, for comparing."""
        return pytest.approx(vector, abs=self.tolerance * max(1.0, float(np.linalg.norm(vector))))

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
            assert alone == self.near(row)
            assert alone == self.near(other)

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

    def test_a_cut_on_the_left_keeps_the_end(self, backend: Backend) -> None:
        """Cut on the left a text keeps its end, as many tokens and the same special ones; a short one is the same."""
        limit = backend.info.max_tokens
        text = "word " * (limit * 2) + "and the very last"
        short, long = backend.tokenize(["short text", text], direction="left")
        assert (short.truncated, long.truncated) == (False, True)
        assert list(short.ids) == list(backend.tokenize(["short text"])[0].ids)
        assert len(long.ids) == limit
        assert backend.decode(long.ids).endswith("and the very last")
        assert backend.decode(backend.tokenize([text])[0].ids).startswith("word word")
        (beginning,) = backend.tokenize([text])
        added = len(backend.pieces("word")) - len(backend.pieces("word", add_special_tokens=False))
        if added == 2:
            assert (long.ids[0], long.ids[-1]) == (beginning.ids[0], beginning.ids[-1])

    def test_pieces_are_the_tokens(self, backend: Backend) -> None:
        """Every token of a text, uncut, in order; its character offsets hold what it says it is."""
        for text in TEXTS:
            pieces = backend.pieces(text)
            (tokens,) = backend.tokenize([text])
            assert [piece.id for piece in pieces] == list(tokens.ids)
            assert [piece for piece in pieces if not piece.special] == backend.pieces(text, add_special_tokens=False)
            for piece in pieces:
                if piece.special:
                    assert (piece.start, piece.stop) == (None, None)
                else:
                    assert piece.text == text[piece.start : piece.stop]
        long = backend.pieces("word " * (backend.info.max_tokens * 2))
        assert len(long) > backend.info.max_tokens

    def test_ids_become_their_text(self, backend: Backend) -> None:
        """Decoding a text's ids gives its words back, without special tokens unless they are asked for."""
        (tokens,) = backend.tokenize(["the quick brown fox"])
        assert backend.decode(tokens.ids).strip() == "the quick brown fox"
        whole = backend.decode(tokens.ids, skip_special_tokens=False)
        assert "the quick brown fox" in whole
        assert backend.decode([]) == ""

    def test_a_token_sequence_of_ones_own_is_computed(self, backend: Backend) -> None:
        """Ids that a caller brings give what the text they come from gives."""
        (tokens,) = backend.tokenize([TEXTS[1]])
        (row,) = backend.forward([Tokens(tuple(tokens.ids), False)])
        assert np.array_equal(row, self.embed(backend, [TEXTS[1]])[0])

    def test_token_vectors_are_one_row_a_token(self, backend: Backend) -> None:
        """Each text has as many rows as ids, float32, of one width, whatever the batch was padded to."""
        batch = backend.tokenize(TEXTS)
        rows = backend.token_vectors(batch)
        assert [len(row) for row in rows] == [len(item.ids) for item in batch]
        assert {(row.dtype, row.shape[1]) for row in rows} == {(np.dtype(np.float32), rows[0].shape[1])}
        for item, row in zip(batch, rows, strict=True):
            assert np.all(np.linalg.norm(row, axis=1) > 0)
            (alone,) = backend.token_vectors([item])
            lengths = np.linalg.norm(alone, axis=1) * np.linalg.norm(row, axis=1)
            assert ((alone * row).sum(axis=1) / lengths).min() > 1 - 100 * self.tolerance

    def test_both_kinds_of_vectors_may_alternate(self, backend: Backend) -> None:
        """Asking for token vectors in between changes no text's vector."""
        before = self.embed(backend, TEXTS)
        backend.token_vectors(backend.tokenize(TEXTS[::-1]))
        assert np.array_equal(self.embed(backend, TEXTS), before)

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
        assert mixed[-1] == self.near(self.embed(backend, [TEXTS[0]])[0])

    def test_it_says_what_it_is(self, backend: Backend) -> None:
        """Name, fingerprint, runtime and precision are told, with the reason for the precision."""
        info = backend.info
        assert all((info.name, info.fingerprint, info.runtime, info.precision_reason))
        assert info.precision in ("fp32", "bf16", "fp16", "int8")
        assert all((info.revision, info.pooling, info.vocabulary_size, info.device))
        assert info.dim > 0
        assert info.max_tokens > 0
