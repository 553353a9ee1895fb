"""Vectors as they leave the service: what each encoding holds, and what is lost by it."""

import base64

import numpy as np
import orjson
import pytest

from services.embedding.outputs import INLINE_FLOATS, encode_vectors, json_response, raw_rows, scales_of, to_int8

VECTORS = np.random.default_rng(7).standard_normal((5, 64)).astype("<f4")


def test_base64_is_little_endian_float32():
    """Each row's bytes come back to the bit."""
    rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in encode_vectors(VECTORS, "base64")]
    assert np.array_equal(rows, VECTORS)


def test_int8_times_its_scale_is_the_vector():
    """A row's numbers use the whole range, and times the scale are off by half a step at most."""
    rows, scales = np.stack(encode_vectors(VECTORS, "int8")), scales_of(VECTORS)
    assert rows.dtype == np.int8
    assert np.abs(rows).max(axis=1).tolist() == [127] * 5
    assert (np.abs(rows * scales[:, None] - VECTORS) <= scales[:, None] * 0.5001).all()


def test_a_vector_of_zeros_has_int8_zeros():
    """Nothing is divided by nothing."""
    zeros = np.zeros((1, 8), dtype=np.float32)
    assert to_int8(zeros).tolist() == [[0] * 8]
    assert scales_of(zeros).tolist() == [1.0]


@pytest.mark.parametrize("dim", [64, 13])
def test_binary_is_the_packed_signs_less_128(dim):
    """Eight dimensions a byte, the first in the highest bit, as sentence-transformers' `binary`; MessagePack has `ubinary`."""
    vectors = VECTORS[:, :dim]
    rows = np.stack(encode_vectors(vectors, "binary"))
    assert rows.dtype == np.int8
    bits = np.unpackbits((rows.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, :dim]
    assert np.array_equal(bits, vectors > 0)
    packed = [np.frombuffer(row, dtype=np.uint8) for row in raw_rows(vectors, "binary")]
    assert np.array_equal(np.unpackbits(packed, axis=1)[:, :dim], vectors > 0)


def test_binary_is_what_sentence_transformers_makes():
    """The library's own function gives the same bytes."""
    from sentence_transformers.util import quantize_embeddings

    assert np.array_equal(np.stack(encode_vectors(VECTORS, "binary")), quantize_embeddings(VECTORS, "binary"))


@pytest.mark.parametrize("rows", [1, INLINE_FLOATS // 64 + 1])
async def test_json_holds_float32(rows):
    """Numbers are written so that they read back as the same float32, whether written here or in a thread."""
    vectors = np.random.default_rng(1).standard_normal((rows, 64)).astype("<f4")
    response = await json_response(lambda: {"rows": encode_vectors(vectors, "float")}, floats=vectors.size)
    assert np.array_equal(np.array(orjson.loads(response.body)["rows"], dtype=np.float32), vectors)
