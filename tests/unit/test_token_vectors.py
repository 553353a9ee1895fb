"""Token vectors as they are kept and shared, and the score that is made of them."""

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from services.rerank.backends.token_vectors import (
    NOTHING_ALIKE,
    TOKENS_AT_ONCE,
    MaxSim,
    TokenVectors,
    in_one_thread,
    packed,
    quantized,
    unpacked,
)

DIM = 48


def unit(rows: int, seed: int = 1) -> np.ndarray:
    """Return *rows* random unit vectors."""
    made = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def restored(vectors: TokenVectors) -> np.ndarray:
    """Return what is kept as float32 vectors."""
    return vectors.codes * vectors.scales[:, None]


class TestQuantized:
    """int8 with a scale a token."""

    def test_products_stay_near(self) -> None:
        """A product with a unit vector is off by less than the sum of half steps could make it, in fact by far less."""
        documents, queries = unit(500), unit(200, seed=2)
        error = np.abs(queries @ restored(quantized(documents)).T - queries @ documents.T)
        assert error.max() < 0.01

    def test_length_does_not_matter(self) -> None:
        """What is kept has unit length, whatever length the model gave, very small and very large too."""
        for length in (1e-20, 1.0, 40.0, 1e20):
            kept = quantized(unit(20) * np.float32(length))
            assert np.linalg.norm(restored(kept), axis=1) == pytest.approx(1.0, abs=1e-6)
            assert (kept.codes == quantized(unit(20)).codes).mean() > 0.999

    def test_zeros_stay_zeros(self) -> None:
        """A vector of zeros has no direction, and a product with it is 0."""
        kept = quantized(np.zeros((2, DIM), np.float32))
        assert kept.finite
        assert not restored(kept).any()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_told(self, bad: float) -> None:
        """One bad number makes its own vector's scale not a number, and no other's; nothing is raised or warned of."""
        vectors = unit(3)
        vectors[1, 5] = bad
        with np.errstate(all="raise"):
            kept = quantized(vectors)
        assert not kept.finite
        assert np.isnan(kept.scales).tolist() == [False, True, False]

    def test_a_text_without_tokens(self) -> None:
        """No tokens are no vectors."""
        kept = quantized(np.empty((0, DIM), np.float32))
        assert kept.finite
        assert kept.codes.shape == (0, DIM)


class TestPacked:
    """As bytes, for other processes."""

    def test_it_comes_back_as_it_was(self) -> None:
        """All numbers survive, and take a quarter of what float32 would."""
        kept = quantized(unit(7))
        raw = packed(kept)
        again = unpacked(raw, most_tokens=9, dim=DIM)
        assert again is not None
        assert (again.codes == kept.codes).all()
        assert (again.scales == kept.scales).all()
        assert len(raw) < 7 * DIM * 1.5

    def test_anything_else_is_nothing(self) -> None:
        """Cut short, longer, of other size, somebody else's, or with scales that no vector has: None."""
        raw = packed(quantized(unit(7)))
        bad_scale = raw[:12] + np.float32(np.nan).tobytes() + raw[16:]
        negative = raw[:12] + np.float32(-0.5).tobytes() + raw[16:]
        large = raw[:12] + np.float32(2.0).tobytes() + raw[16:]
        for other in (b"", raw[:-1], raw + b"\0", b"XXXX" + raw[4:], raw[:11], bad_scale, negative, large):
            assert unpacked(other, most_tokens=9, dim=DIM) is None
        assert unpacked(raw, most_tokens=DIM, dim=7) is None
        assert unpacked(raw, most_tokens=6, dim=DIM) is None


class TestMaxSim:
    """One number a document."""

    def test_it_is_the_sum_of_greatest_products(self) -> None:
        """However documents' lengths fall on what is multiplied at once: short, longer than it, many, with empty ones."""
        most = TOKENS_AT_ONCE
        lengths = (3, 0, 1, most - 12, 12, most + 1, 1, 4 * most, 0, most - 1, 1, 1, most + 200, most)
        documents = [quantized(unit(length, seed=length + 5)) for length in lengths]
        query = unit(9, seed=99)
        expected = [
            (query @ restored(document).T).max(axis=1).sum() if len(document.codes) else NOTHING_ALIKE
            for document in documents
        ]
        max_sim = MaxSim(DIM)
        assert max_sim(query, documents) == pytest.approx(np.array(expected), abs=1e-4)
        assert max_sim(query, documents[::-1]) == pytest.approx(np.array(expected[::-1]), abs=1e-4)

    def test_without_tokens_nothing_is_alike(self) -> None:
        """A query or a document without tokens, and no documents at all."""
        max_sim = MaxSim(DIM)
        none = quantized(np.empty((0, DIM), np.float32))
        assert max_sim(np.empty((0, DIM), np.float32), [quantized(unit(3))]).tolist() == [NOTHING_ALIKE]
        assert max_sim(unit(2), [none, none]).tolist() == [NOTHING_ALIKE] * 2
        assert max_sim(unit(2), []).shape == (0,)

    def test_what_is_not_a_number_concerns_its_document_only(self) -> None:
        """Documents beside it in the same multiplication keep their scores."""
        bad = unit(4, seed=4)
        bad[2, 2] = np.nan
        good = [quantized(unit(5, seed=seed)) for seed in (7, 8)]
        max_sim = MaxSim(DIM)
        scores = max_sim(unit(3), [good[0], quantized(bad), good[1]])
        assert np.isnan(scores).tolist() == [False, True, False]
        assert scores[[0, 2]] == pytest.approx(max_sim(unit(3), good), abs=1e-6)


def test_threads_are_as_before() -> None:
    """What multiplies in one thread leaves NumPy as many as it had."""

    def blas_threads() -> list[int]:
        return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

    before = blas_threads()
    with in_one_thread():
        assert set(blas_threads()) <= {1}
    assert blas_threads() == before
