"""What comes through HTTP at the precision that `auto` chose, beside sentence-transformers at fp32."""

import base64

import numpy as np
import pytest

from services.common.model_files import DEFAULT_MODEL, resolve_model
from tests.contract.mixed_texts import mixed_texts

A_REQUEST = 250


@pytest.mark.slow
def test_a_thousand_mixed_texts_are_those_of_fp32(http) -> None:
    """Every vector has a cosine of 0.999 at least to fp32's, and is nearest to its own: the order is kept."""
    from sentence_transformers import SentenceTransformer

    texts = mixed_texts(1_000)
    rows = []
    for start in range(0, len(texts), A_REQUEST):
        asked = {"inputs": texts[start : start + A_REQUEST], "encoding": "base64"}
        data = http.post("/embed", json=asked).raise_for_status().json()["data"]
        assert [item["index"] for item in data] == list(range(A_REQUEST))
        rows += [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
    vectors = np.stack(rows)
    model = SentenceTransformer(str(resolve_model(DEFAULT_MODEL)), device="cpu", local_files_only=True)
    expected = model.encode(texts, convert_to_numpy=True, normalize_embeddings=True)
    assert (vectors * expected).sum(axis=1).min() >= 0.999
    assert np.array_equal(np.argmax(vectors @ expected.T, axis=1), np.arange(len(texts)))
