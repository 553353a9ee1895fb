"""The embedding service's API, whole and in this process: routes, bad input, metrics, and the openai client."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import numpy as np
import openai
import orjson
import pytest
from sentence_transformers import SentenceTransformer

from services.common.metrics import LATENCY_BUCKETS_S
from services.common.model_errors import ModelNotFound
from services.common.model_files import DEFAULT_MODEL, resolve_model
from services.common.wire.base import MAX_INPUT_CHARS
from services.embedding.app import create_app
from services.embedding.settings import EmbeddingSettings
from tests.integration.conftest import JSON, UNREADABLE, Refused, Serve

TEXTS = ["the quick brown fox", "Naïve café, 東京, 🙂", "fox", "word " * 300]


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service with the fake model."""
    async with serve(create_app(EmbeddingSettings(model="fake"))) as client:
        yield client


async def embed(client: httpx2.AsyncClient, **body) -> dict:
    """Embed, which must succeed."""
    response = await client.post("/embed", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def decode(vector: str) -> list[float]:
    """Return the numbers in a base64 vector."""
    return np.frombuffer(base64.b64decode(vector), dtype="<f4").tolist()


# --- routes ---------------------------------------------------------------------------------------------------------


async def test_embed_answers_in_order(client):
    """Each text has its vector, its tokens and whether it was cut, in the order given; usage is their sum."""
    reply = await embed(client, inputs=TEXTS)
    assert [item["index"] for item in reply["data"]] == [0, 1, 2, 3]
    assert [item["truncated"] for item in reply["data"]] == [False, False, False, True]
    assert [item["tokens"] for item in reply["data"]] == [4, 3, 1, 256]
    assert reply["usage"] == {"prompt_tokens": 264, "total_tokens": 264, "cached_tokens": 0}
    assert (reply["model"], reply["fingerprint"]) == ("fake", "fake@1/256")
    assert set(reply["timings"]) == {"tokenization_ms", "queue_ms", "inference_ms"}
    for text, item in zip(TEXTS, reply["data"], strict=True):
        alone = (await embed(client, inputs=text))["data"][0]["embedding"]
        assert item["embedding"] == pytest.approx(alone, abs=1e-6)


async def test_vectors_are_of_unit_length(client):
    """Vectors are normalised unless that is not wanted."""
    vectors = [item["embedding"] for item in (await embed(client, inputs=TEXTS))["data"]]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)


async def test_base64_equals_float(client):
    """Both encodings carry the same float32 numbers, natively and in OpenAI's dialect."""
    floats = await embed(client, inputs=TEXTS, encoding="float")
    packed = await embed(client, inputs=TEXTS, encoding="base64")
    expected = [np.float32(item["embedding"]).tolist() for item in floats["data"]]
    assert [decode(item["embedding"]) for item in packed["data"]] == expected
    for encoding, read in (("float", np.float32), ("base64", decode)):
        body = {"input": TEXTS, "model": "fake", "encoding_format": encoding}
        reply = (await client.post("/v1/embeddings", json=body)).json()
        assert [list(read(item["embedding"])) for item in reply["data"]] == expected


async def test_the_openai_shape(client):
    """/v1/embeddings answers with OpenAI's objects, and takes `user`."""
    body = {"input": "fox", "model": "fake", "user": "somebody"}
    reply = (await client.post("/v1/embeddings", json=body)).json()
    assert (reply["object"], reply["model"]) == ("list", "fake")
    assert reply["usage"] == {"prompt_tokens": 1, "total_tokens": 1}
    assert [(item["object"], item["index"], len(item["embedding"])) for item in reply["data"]] == [("embedding", 0, 64)]


async def test_the_model_is_described(client):
    """/models, /v1/models and /info name it; /info says how it runs."""
    for path in ("/models", "/v1/models"):
        reply = (await client.get(path)).json()
        assert [(card["id"], card["object"], card["owned_by"]) for card in reply["data"]] == [
            ("fake", "model", "tercet")
        ]
    info = (await client.get("/info")).json()
    assert (info["model"], info["fingerprint"], info["dim"], info["max_tokens"]) == ("fake", "fake@1/256", 64, 256)
    assert {"prompts", "runtime", "precision", "precision_reason"} <= set(info)


async def test_the_most_inputs_allowed(client):
    """2,048 texts in one request, the documented limit, are answered."""
    reply = await embed(client, inputs=[f"text {number}" for number in range(2048)], encoding="base64")
    assert len(reply["data"]) == 2048


async def test_the_longest_text_allowed(client):
    """A text of eight million characters is cut and flagged."""
    (item,) = (await embed(client, inputs="word " * (MAX_INPUT_CHARS // 5)))["data"]
    assert item["truncated"]


async def test_health_and_documentation(client):
    """The health routes answer, and the API documents itself."""
    assert (await client.get("/livez")).json() == {"status": "ok", "problems": []}
    assert (await client.get("/readyz")).json() == {"status": "ok", "problems": []}
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/embed", "/models", "/info", "/v1/embeddings", "/v1/models", "/livez", "/readyz", "/metrics"} <= set(paths)


async def test_metrics_are_there_from_the_start(client):
    """Before any traffic /metrics has the series that alerts and dashboards need."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for series in (
        'tercet_service_info{service="embedding"} 1.0',
        'tercet_embedding_tokens_total{lane="query"}',
        'tercet_embedding_tokens_total{lane="bulk"} 0.0',
        "tercet_embedding_padding_tokens_total",
        "tercet_embedding_query_queue_items 0.0",
        "tercet_embedding_bulk_queue_items 0.0",
        "tercet_embedding_inference_seconds_count",
        "tercet_embedding_batch_items_count",
        'tercet_errors_total{code="overloaded"} 0.0',
        'tercet_embedding_cache_texts_total{result="hit"} 0.0',
        'tercet_embedding_model_loads_total{result="ok"} 1.0',
        'tercet_embedding_model_evictions_total{reason="memory"} 0.0',
        "tercet_embedding_models 1.0",
        "tercet_embedding_models_bytes",
        'embedding_requests_total{status="200"} 0.0',
        "embedding_latency_seconds_count 0.0",
        "gpu_memory_used_bytes",
        "te_request_count 0.0",
        "te_request_success 0.0",
        "te_request_failure 0.0",
        "te_request_duration_count 0.0",
        "te_request_tokenization_duration_count",
        "te_request_queue_duration_count",
        "te_request_inference_duration_count",
        "te_request_input_length_count",
        "te_queue_size 0.0",
        "te_batch_next_size_count",
        "te_batch_next_tokens_count",
        "tercet_http_requests_in_flight 1.0",
        "process_resident_memory_bytes",
    ):
        assert f"\n{series}" in response.text, series
    assert {0.01, 0.05, 0.1, 0.25, 0.5, 1.0} <= set(LATENCY_BUCKETS_S)


async def test_metrics_count_the_tokens_of_each_lane(serve: Serve):
    """One text is a query and several are bulk, unless the request says; each lane's tokens are counted."""
    async with serve(create_app(EmbeddingSettings(model="fake", cache_bytes=0))) as client:
        await _count_the_tokens_of_each_lane(client)


async def _count_the_tokens_of_each_lane(client: httpx2.AsyncClient) -> None:
    async def tokens(lane: str) -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        return next(
            float(line.split()[-1])
            for line in lines
            if line.startswith(f'tercet_embedding_tokens_total{{lane="{lane}"')
        )

    at_first = await tokens("query")
    await embed(client, inputs="one two three")
    await embed(client, inputs=["one two", "three"], lane="query")
    assert (await tokens("query") - at_first, await tokens("bulk")) == (6, 0)
    await embed(client, inputs=["one two", "three four five"])
    await embed(client, inputs="six", lane="bulk")
    assert (await tokens("query") - at_first, await tokens("bulk")) == (6, 6)


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_TEXTS = [
    ("empty", "", "", 422),
    ("blank", " \n\t", "", 422),
    ("a null byte", "a\0b", "", 422),
    ("over the limit", "x" * (MAX_INPUT_CHARS + 1), "", 422),
    ("a number", 5, "", 422),
    ("true", True, "", 422),
    ("null", None, "", 422),
    ("an object", {"text": "a"}, "", 422),
    ("no texts", [], "", 422),
    ("2,049 texts", ["a"] * 2049, "", 413),
    ("one empty text", ["a", "", "c"], ".1", 422),
    ("one null byte", ["a", "b", "\0"], ".2", 422),
    ("one number", ["a", 5], ".1", 422),
    ("token ids", [1, 2, 3], ".0", 422),
    ("a list of lists", [["a"]], ".0", 422),
    ("one text over the limit", ["a", "x" * (MAX_INPUT_CHARS + 1)], ".1", 422),
]
bad_texts = pytest.mark.parametrize(
    ("inputs", "at", "status"), [row[1:] for row in BAD_TEXTS], ids=[row[0] for row in BAD_TEXTS]
)


@bad_texts
async def test_bad_inputs_are_refused_by_name(client, refused: Refused, inputs, at, status):
    """Each bad text is a 4xx that names the text at fault, and the service goes on."""
    got, error = await refused("/embed", {"inputs": inputs})
    assert (got, error["param"]) == (status, f"inputs{at}")
    assert "valid string" not in error["message"] or not isinstance(inputs, list) or at
    assert len((await embed(client, inputs="good"))["data"]) == 1


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"model": "other"}, "model", 404),
        ({"model": 5}, "model", 422),
        ({"model": "x" * 100_000}, "model", 404),
        ({"colour": "red"}, "colour", 422),
        ({"input_type": "sentence"}, "input_type", 422),
        ({"normalize": "yes"}, "normalize", 422),
        ({"truncate": 0}, "truncate", 422),
        ({"lane": "fast"}, "lane", 422),
        ({"encoding": "hex"}, "encoding", 422),
        ({"truncate": False, "inputs": ["short", "word " * 300]}, "inputs.1", 422),
        ({"truncation_direction": "middle"}, "truncation_direction", 422),
        ({"dimensions": 0}, "dimensions", 422),
        ({"dimensions": 32}, "dimensions", 422),
        ({"prompt_name": "sts"}, "prompt_name", 422),
        ({"input_type": "query", "prompt_name": "query"}, "prompt_name", 422),
        ({"texts": ["a"]}, "texts", 422),
        ({"text": "a"}, "text", 422),
        ({"model": "fake", "model_name": "fake"}, "model_name", 422),
    ],
)
async def test_bad_fields_are_refused_by_name(client, refused: Refused, fields, param, status):
    """Unknown fields, unknown models and wrong types are a 4xx that names the field."""
    got, error = await refused("/embed", {"inputs": "good", **fields})
    assert (got, error["param"]) == (status, param)


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"model": "other"}, "model", 404),
        ({"dimensions": 32}, "dimensions", 400),
        ({"encoding_format": "x"}, "encoding_format", 400),
    ],
)
async def test_bad_openai_fields_are_refused_by_name(client, refused: Refused, fields, param, status):
    """What is not supported is refused, never silently left out."""
    got, error = await refused("/v1/embeddings", {"input": "good", "model": "fake", **fields})
    assert (got, error["param"]) == (status, param)


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
@pytest.mark.parametrize("body", [row[1] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
async def test_unreadable_bodies_are_malformed(client, refused: Refused, path, body):
    """What is no JSON object in UTF-8 is 400, and the service goes on."""
    status, error = await refused(path, body)
    assert (status, error["code"], error["param"]) == (400, "malformed_request", "body")
    assert (await embed(client, inputs="good"))["data"]


async def test_a_body_over_the_limit(serve: Serve):
    """A body over max_body_bytes is 413, whether its length is stated or it comes in chunks."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async with serve(create_app(EmbeddingSettings(model="fake", max_body_bytes=10_000))) as client:
        for content in (b"x" * 10_001, chunks()):
            response = await client.post("/embed", content=content, headers=JSON)
            assert (response.status_code, response.json()["error"]["param"]) == (413, "body")
        assert (await embed(client, inputs="good"))["data"]


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "0"])
async def test_a_bad_deadline_is_malformed(client, value):
    """A deadline that is no number names its header."""
    response = await client.post("/embed", json={"inputs": "a"}, headers={"x-deadline-ms": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-deadline-ms")


async def test_a_deadline_that_cannot_be_met_is_504(client):
    """Work that nobody waits for any more is given up, in the envelope."""
    response = await client.post("/embed", json={"inputs": ["text"] * 2048}, headers={"x-deadline-ms": "0.001"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert (await embed(client, inputs="good"))["data"]


async def test_other_methods_and_routes(client):
    """A wrong method is 405 and a missing route 404, in the envelope."""
    assert (await client.get("/embed")).json()["error"]["code"] == "method_not_allowed"
    assert (await client.post("/embeddings")).json()["error"]["code"] == "not_found"


async def test_a_model_that_is_not_there_stops_the_start(serve: Serve, tmp_path: Path):
    """A service without its model does not start."""
    with pytest.raises(ModelNotFound):
        async with serve(create_app(EmbeddingSettings(model=str(tmp_path / "gone")))):
            pass


# --- the real model -------------------------------------------------------------------------------------------------


@pytest.fixture
async def real(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service with the packaged model at fp32."""
    async with serve(create_app(EmbeddingSettings(precision="fp32", device="cpu"))) as client:
        yield client


@pytest.mark.slow
async def test_the_openai_client_gets_what_sentence_transformers_gives(real):
    """The openai client's vectors, as base64 and as floats, have a cosine of at least 0.9999 to those made in-process."""
    texts = [*TEXTS, "What is the capital of France?", "x", "def f(a: int) -> str: ...", "a\tb\nc"]
    model = SentenceTransformer(str(resolve_model(DEFAULT_MODEL)), device="cpu", local_files_only=True)
    expected = model.encode(texts, convert_to_numpy=True, normalize_embeddings=True)
    sent: list[str] = []

    async def note(request: httpx2.Request) -> None:
        sent.append(orjson.loads(request.content)["encoding_format"])

    real.event_hooks = {"request": [note]}
    sdk = openai.AsyncOpenAI(api_key="unused", base_url="http://service/v1", http_client=real, max_retries=0)
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        reply = await sdk.embeddings.create(input=texts, model=DEFAULT_MODEL, **options)
        vectors = [decode(item.embedding) if isinstance(item.embedding, str) else item.embedding for item in reply.data]
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
        assert (np.array(vectors) * expected).sum(axis=1).min() >= 0.9999
        assert reply.usage.prompt_tokens == sum(
            len(model.tokenizer(t, truncation=True, max_length=256)["input_ids"]) for t in texts
        )
    assert sent == ["base64", "float", "base64"]
    real.event_hooks = {}
    assert [card.id async for card in sdk.models.list()] == [DEFAULT_MODEL]
    with pytest.raises(openai.NotFoundError, match=DEFAULT_MODEL):
        await sdk.embeddings.create(input="a", model="text-embedding-3-small")
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.embeddings.create(input=["a", ""], model=DEFAULT_MODEL)
    assert (caught.value.param, caught.value.code) == ("input.1", "empty_input")


@pytest.mark.slow
async def test_the_real_model_takes_any_text(real):
    """Special tokens, control characters and emoji are text like any other, and change no other text's vector."""
    odd = ["[CLS] [SEP] [MASK] [PAD]", "\u200b.", "🙂" * 500, "\U0010ffff", "<|endoftext|>", "e" * 5000, "a\r\n\tb"]
    together = (await embed(real, inputs=[*odd, "good"]))["data"]
    assert all(np.isfinite(item["embedding"]).all() for item in together)
    alone = (await embed(real, inputs="good"))["data"][0]["embedding"]
    assert together[-1]["embedding"] == pytest.approx(alone, abs=1e-5)
