"""
Fewer dimensions for token vectors: the directions in which a model's token vectors are longest.

They are found in the vectors of a fixed sample of the model's own vocabulary, so no text is needed, and two processes
that load the same model on like machines find the same.
"""

from typing import Final

import numpy as np

from services.common.encoders import Encoder, Projection
from services.common.tokens import Tokens

_SEED: Final = 20
_TEXTS: Final = 128
_TOKENS_A_TEXT: Final = 48
_TEXTS_AT_ONCE: Final = 16


def token_projection(encoder: Encoder, dimensions: int) -> Projection:
    """
    Return the projection to *dimensions* that keeps most of the squared length of unit token vectors.

    Its rows are orthonormal and its mean is 0, so that products of what it keeps stay near the products of the whole
    vectors. The sample is read by *encoder* as texts of random words: some thousand tokens, a moment.
    """
    description = encoder.description
    frame = encoder.tokenizer.before, encoder.tokenizer.after
    words = np.setdiff1d(np.arange(description.vocabulary_size), [description.pad_id, *frame[0], *frame[1]])
    room = min(_TOKENS_A_TEXT, description.max_tokens - len(frame[0]) - len(frame[1]))
    drawn = np.random.default_rng(_SEED).choice(words, (_TEXTS, room))
    texts = [Tokens([*frame[0], *row, *frame[1]], truncated=False) for row in drawn.tolist()]
    moments = np.zeros((description.token_dim, description.token_dim))
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for vectors in encoder.per_token(texts[start : start + _TEXTS_AT_ONCE]):
            inner = vectors[len(frame[0]) : len(vectors) - len(frame[1])].astype(np.float64)
            unit = inner / np.maximum(np.linalg.norm(inner, axis=1, keepdims=True), np.finfo(np.float64).tiny)
            moments += unit.T @ unit
    components = np.linalg.eigh(moments)[1][:, ::-1][:, :dimensions].T
    # An eigenvector's sign is arbitrary.
    components *= np.sign(components[np.arange(dimensions), np.abs(components).argmax(axis=1)])[:, None]
    return Projection(np.zeros(description.token_dim, dtype=np.float32), components.astype(np.float32))
