"""What comes through HTTP at the precision that `auto` chose, beside sentence-transformers at fp32."""

import base64
import random

import numpy as np
import pytest

from services.common.model_files import DEFAULT_MODEL, resolve_model

WORDS = [
    "the",
    "quick",
    "fox",
    "naïve",
    "café",
    "東京",
    "都市",
    "Москва",
    "القاهرة",
    "दिल्ली",
    "12,345.67",
    "{json:",
    "🙂",
    "retrieval",
    "systems",
    "answer",
    "questions",
    "Überraschung",
    "ελληνικά",
    "한국어",
    "x=y+1",
    "<tag>",
    "https://example.org/a?b=c",
]
A_REQUEST = 250


def mixed_texts(count: int) -> list[str]:
    """Return *count* texts of 1 to over 600 tokens, short ones being as many as long ones, in several scripts."""
    rng = random.Random(3)
    lengths = [round(float(np.exp(rng.uniform(0, np.log(330))))) for _ in range(count)]
    return [" ".join(rng.choice(WORDS) for _ in range(length)) + f" {index}" for index, length in enumerate(lengths)]


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
