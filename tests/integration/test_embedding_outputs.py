"""What the native routes send back: encodings, MessagePack, other names, prompts, dimensions, tokens, the cache."""

import base64
from collections.abc import AsyncIterator, Sequence

import httpx2
import numpy as np
import ormsgpack
import pytest

from services.embedding import routes
from services.embedding.app import create_app
from services.embedding.dialects import api_v1, openai, tei
from services.embedding.metrics import EMBED_ROUTES
from services.embedding.outputs import MSGPACK
from services.embedding.ports import Backend
from services.embedding.settings import EmbeddingSettings
from tests.embedding_backends import SizedBackend
from tests.integration.conftest import Serve

TEXTS = ["the quick brown fox", "naïve café", "word " * 300]


def load(_spec: object, _settings: object) -> Sequence[Backend]:
    """The fake model, with prompts and declared dimensions."""
    return [SizedBackend(prompts={"query": "find ", "document": "this says ", "sts": "like "}, dimensions=(16, 32))]


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service whose model has prompts and may be cut."""
    async with serve(create_app(EmbeddingSettings(model="fake"), load=load)) as client:
        yield client


async def embed(client: httpx2.AsyncClient, **body) -> dict:
    """Embed, which must succeed."""
    response = await client.post("/embed", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def vectors(client: httpx2.AsyncClient, **body) -> np.ndarray:
    """Return the vectors alone."""
    return np.array([item["embedding"] for item in (await embed(client, **body))["data"]], dtype=np.float32)


async def test_every_encoding_holds_the_same_vector(client):
    """base64 to the bit, int8 within half a step, binary its signs."""
    floats = await vectors(client, inputs=TEXTS)
    packed = (await embed(client, inputs=TEXTS, encoding="base64"))["data"]
    assert np.array_equal([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed], floats)
    int8 = (await embed(client, inputs=TEXTS, encoding="int8"))["data"]
    restored = np.array([np.array(item["embedding"]) * item["scale"] for item in int8])
    assert all(isinstance(number, int) for number in int8[0]["embedding"])
    assert np.abs(restored - floats).max() <= max(item["scale"] for item in int8) * 0.51
    binary = (await embed(client, inputs=TEXTS, encoding="binary"))["data"]
    bits = np.unpackbits((np.array([item["embedding"] for item in binary]) + 128).astype(np.uint8), axis=1)
    assert np.array_equal(bits, floats > 0)


@pytest.mark.parametrize(
    ("encoding", "dtype", "read"),
    [("float", "float32", "<f4"), ("base64", "float32", "<f4"), ("int8", "int8", "i1"), ("binary", "binary", "u1")],
)
async def test_messagepack_holds_raw_bytes(client, encoding, dtype, read):
    """Who accepts application/msgpack gets the vectors as bytes with their type, and everything else as in JSON."""
    body = {"inputs": TEXTS, "encoding": encoding}
    response = await client.post("/embed", json=body, headers={"accept": f"{MSGPACK}, application/json;q=0.5"})
    assert response.headers["content-type"] == MSGPACK
    packed, plain = ormsgpack.unpackb(response.content), await embed(client, **body)
    assert {key: packed[key] for key in ("model", "fingerprint")} == {
        key: plain[key] for key in ("model", "fingerprint")
    }
    floats = await vectors(client, inputs=TEXTS)
    for index, item in enumerate(packed["data"]):
        assert (item["index"], item["dtype"]) == (index, dtype)
        assert (item["tokens"], item["truncated"]) == (
            plain["data"][index]["tokens"],
            plain["data"][index]["truncated"],
        )
        numbers = np.frombuffer(item["embedding"], read)
        if dtype == "float32":
            assert np.array_equal(numbers, floats[index])
        elif dtype == "int8":
            assert numbers.tolist() == plain["data"][index]["embedding"]
            assert item["scale"] == plain["data"][index]["scale"]
        else:
            assert np.array_equal(np.unpackbits(numbers), floats[index] > 0)


async def test_a_large_reply_is_the_same(client):
    """A reply that is written in a thread holds what one written here holds."""
    texts = [f"text {number}" for number in range(600)]
    many = await vectors(client, inputs=texts)
    assert np.array_equal(many[[0, 599]], await vectors(client, inputs=[texts[0], texts[599]]))


@pytest.mark.parametrize(
    "body", [{"texts": TEXTS[:2]}, {"text": TEXTS[0]}, {"inputs": TEXTS[:2], "model_name": "fake"}]
)
async def test_other_names_for_the_fields(client, body):
    """`texts`, `text` and `model_name` are understood, and whoever uses them gets `embeddings` and `latency_ms` too."""
    reply = await embed(client, **body)
    assert reply["embeddings"] == [item["embedding"] for item in reply["data"]]
    assert reply["latency_ms"] > 0
    assert not {"embeddings", "latency_ms"} & set(await embed(client, inputs=TEXTS[0]))


async def test_errors_use_the_callers_names(client):
    """A fault in `texts` is told as `texts.1`."""
    response = await client.post("/embed", json={"texts": ["short", "word " * 300], "truncate": False})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "texts.1")
    response = await client.post("/embed", json={"texts": ["a", ""]})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "texts.1")


async def test_prompts(client):
    """An input type or a prompt's name puts the prompt before the text."""
    expected = await vectors(client, inputs=["find red", "this says red", "like red"])
    for row, options in zip(
        expected, ({"input_type": "query"}, {"input_type": "document"}, {"prompt_name": "sts"}), strict=True
    ):
        assert np.array_equal((await vectors(client, inputs="red", **options))[0], row)


async def test_dimensions(client):
    """A declared size is served at unit length under a fingerprint of its own; another is refused with the sizes."""
    reply = await embed(client, inputs="red", dimensions=16)
    assert np.linalg.norm(reply["data"][0]["embedding"]) == pytest.approx(1, abs=1e-6)
    assert (len(reply["data"][0]["embedding"]), reply["fingerprint"]) == (16, "fake@1/256/16d")
    refused = await client.post("/embed", json={"inputs": "red", "dimensions": 20})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "dimensions")
    assert "16, 32" in refused.json()["error"]["message"]


async def test_either_side_is_cut(client):
    """truncation_direction says which side of a long text goes."""
    text = "first " + "word " * 300 + "last"
    right, left = [(await vectors(client, inputs=text, truncation_direction=side))[0] for side in ("right", "left")]
    assert np.array_equal(right, (await vectors(client, inputs="first " + "word " * 255))[0])
    assert np.array_equal(left, (await vectors(client, inputs="word " * 255 + "last"))[0])


async def test_what_the_cache_knew_is_told(client):
    """Tokens of texts seen before are counted as cached, and the vectors are the same."""
    first = await embed(client, inputs=["one two", "three"])
    second = await embed(client, inputs=["three", "four", "one two"])
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"] == {"prompt_tokens": 4, "total_tokens": 4, "cached_tokens": 3}
    assert second["data"][2]["embedding"] == first["data"][0]["embedding"]
    metrics = (await client.get("/metrics")).text
    assert 'tercet_embedding_cache_texts_total{result="hit"} 2.0' in metrics
    assert 'tercet_embedding_cache_texts_total{result="miss"} 3.0' in metrics


async def test_requests_are_counted_under_other_names(client):
    """The reference architecture's and TEI's names count what ours count, refusals included."""
    await embed(client, inputs="red green")
    await client.post("/embed", json={"inputs": ""})
    metrics = (await client.get("/metrics")).text
    for line in (
        'embedding_requests_total{status="200"} 1.0',
        'embedding_requests_total{status="422"} 1.0',
        "embedding_latency_seconds_count 2.0",
        "te_request_count 2.0",
        "te_request_success 1.0",
        "te_request_failure 1.0",
        "te_request_input_length_sum 2.0",
    ):
        assert f"\n{line}" in metrics, line


def test_the_routes_that_are_counted_exist():
    """The other names count all routes that embed, and no name of a route is misspelt."""
    routers = (routes.router, openai.router, tei.router, api_v1.router)
    posts = {route.path for router in routers for route in router.routes if "POST" in route.methods}  # type: ignore[attr-defined]
    assert posts - EMBED_ROUTES == {"/tokenize", "/tei/tokenize", "/tei/decode"}
    assert posts >= EMBED_ROUTES


async def test_tokenize(client):
    """Every token with its id, its text and the characters it covers, uncut; a prompt may go before."""
    reply = (await client.post("/tokenize", json={"inputs": ["Red, green", "word " * 300]})).json()
    assert [item["index"] for item in reply["data"]] == [0, 1]
    assert [(token["text"], token["start"], token["stop"]) for token in reply["data"][0]["tokens"]] == [
        ("Red", 0, 3),
        ("green", 5, 10),
    ]
    assert set(reply["data"][0]["tokens"][0]) == {"id", "text", "special", "start", "stop"}
    assert len(reply["data"][1]["tokens"]) == 300
    one = (await client.post("/tokenize", json={"inputs": "red", "prompt_name": "query"})).json()
    assert [token["text"] for token in one["data"][0]["tokens"]] == ["find", "red"]
    refused = await client.post("/tokenize", json={"inputs": "red", "prompt_name": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "prompt_name")
