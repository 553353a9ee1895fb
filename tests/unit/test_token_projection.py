"""Fewer dimensions for token vectors."""

import numpy as np
import pytest

from services.rerank.backends.token_projection import token_projection
from tests.table_encoder import DIM, TableEncoder


def test_rows_are_orthonormal_and_nothing_is_subtracted() -> None:
    """A projection to all dimensions would keep every product."""
    projection = token_projection(TableEncoder(), 10)
    assert projection.components.shape == (10, DIM)
    assert projection.components @ projection.components.T == pytest.approx(np.eye(10), abs=1e-5)
    assert not projection.mean.any()


def test_what_the_model_does_not_use_is_left_out() -> None:
    """Where a model's vectors lie in fewer dimensions, those are the ones that are kept: no product changes."""
    encoder = TableEncoder()
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(DIM, 6)))[0].astype(np.float32)
    encoder.table = encoder.table[:, :6] @ basis.T
    kept = encoder.table @ token_projection(encoder, 6).components.T
    assert kept @ kept.T == pytest.approx(encoder.table @ encoder.table.T, abs=1e-3)


def test_two_processes_find_the_same() -> None:
    """Otherwise they could not share vectors."""
    first, second = token_projection(TableEncoder(), 7), token_projection(TableEncoder(), 7)
    assert first.name == second.name
    assert first.name != token_projection(TableEncoder(seed=4), 7).name


def test_only_what_the_model_reads_is_asked_for() -> None:
    """The sample's texts are framed by the special tokens, which are not in it, and are no longer than the model reads."""
    encoder = TableEncoder()
    token_projection(encoder, 4)
    before, after = encoder.tokenizer.before, encoder.tokenizer.after
    special = {*before, *after, encoder.description.pad_id}
    for ids in encoder.read:
        assert (ids[:1], ids[-1:]) == (before, after)
        assert not special.intersection(ids[1:-1])
