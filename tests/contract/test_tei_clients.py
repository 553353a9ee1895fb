"""
TEI's dialect with the clients that speak it, and over plain HTTP route by route.

What is expected is what text-embeddings-inference's own router answers (router/src/http/server.rs and types.rs).
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

from services.common.model_files import DEFAULT_MODEL
from tests.contract.conftest import TEXTS, assert_same_vectors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENTS_PYTHON = ROOT / ".venv-clients" / "bin" / "python"
LONG = "a tide gauge " * 200
HEADERS = {
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
}


# --- clients ------------------------------------------------------------------------------------------------------


async def test_llama_indexs_class(server, reference):
    """LlamaIndex's TEI class needs the base URL alone."""
    embedding = TextEmbeddingsInference(model_name=DEFAULT_MODEL, base_url=f"{server}/tei", embed_batch_size=3)
    assert_same_vectors(embedding.get_text_embedding_batch(TEXTS), reference)
    assert_same_vectors([embedding.get_query_embedding(TEXTS[0])], reference[:1])
    assert_same_vectors(await embedding.aget_text_embedding_batch(TEXTS), reference)


@pytest.mark.parametrize("path", ["/tei", "/tei/", "/tei/embed"])
async def test_hugging_faces_inference_client(server, reference, path):
    """InferenceClient posts to the URL it is given, with TEI's options beside the inputs."""
    client = InferenceClient(base_url=f"{server}{path}")
    assert_same_vectors(client.feature_extraction(TEXTS), reference)
    assert_same_vectors(client.feature_extraction(TEXTS[0]), reference[:1])
    assert_same_vectors(client.feature_extraction(TEXTS, normalize=True, truncate=True), reference)
    with pytest.raises(HfHubHTTPError) as caught:
        client.feature_extraction(LONG, truncate=False)
    assert caught.value.response.status_code == 422
    async with AsyncInferenceClient(base_url=f"{server}{path}") as async_client:
        assert_same_vectors(await async_client.feature_extraction(TEXTS), reference)


def test_hugging_faces_similarity(server, reference):
    """InferenceClient's sentence similarity is the cosine of the vectors."""
    client = InferenceClient(base_url=f"{server}/tei/similarity")
    cosines = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert cosines == pytest.approx((reference[1:] @ reference[0]).tolist(), abs=0.02)


@pytest.mark.skipif(not CLIENTS_PYTHON.exists(), reason="`make test-clients` installs langchain-huggingface")
def test_langchains_class(server, reference):
    """LangChain's class, in an environment of its own, embeds documents and queries, sync and async."""
    script = ROOT / "tests" / "contract" / "clients" / "embed_texts.py"
    command = [str(CLIENTS_PYTHON), str(script), f"{server}/tei"]
    done = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True, timeout=60)
    made = json.loads(done.stdout)
    assert_same_vectors(made["documents"], reference)
    assert_same_vectors([made["query"]], reference[:1])
    assert_same_vectors(made["async_documents"], reference)


# --- routes -------------------------------------------------------------------------------------------------------


def test_embed_takes_texts_token_ids_and_both(http, reference):
    """`inputs` is a text, a list of ids, or a list in which both are mixed; the answer is a bare array, in order."""
    (tokens,) = http.post("/tei/tokenize", json={"inputs": TEXTS[0]}).json()
    ids = [token["id"] for token in tokens]
    for inputs in (TEXTS[0], [TEXTS[0]], ids, [ids]):
        assert_same_vectors(http.post("/tei/embed", json={"inputs": inputs}).json(), reference[:1])
    mixed = http.post("/tei/embed", json={"inputs": [TEXTS[1], ids, TEXTS[2]], "unknown": 1}).json()
    assert_same_vectors(mixed, reference[[1, 0, 2]])


@pytest.mark.parametrize("path", ["/tei", "/tei/", "/tei/invocations"])
def test_embed_has_teis_other_addresses(http, reference, path):
    """The root, and SageMaker's /invocations, embed."""
    assert_same_vectors(http.post(path, json={"inputs": TEXTS}).json(), reference)


def test_embed_without_normalisation(http, reference):
    """`normalize: false` gives the pooled vectors as they are, of other lengths and the same directions."""
    made = np.array(http.post("/tei/embed", json={"inputs": TEXTS, "normalize": False}).json())
    lengths = np.linalg.norm(made, axis=1, keepdims=True)
    assert np.all(np.abs(lengths - 1) > 0.1)
    assert_same_vectors((made / lengths).tolist(), reference)


def test_truncation_keeps_the_side_that_is_asked_for(http):
    """`right`, the default, and `left` cut the end and the beginning, in TEI's and in Rust's spelling; null is the default."""
    ends = ["the sea is calm " + LONG, LONG + " the sea is calm"]

    def embed(text: str, **options) -> list[float]:
        return http.post("/tei/embed", json={"inputs": text, **options}).json()[0]

    assert embed(ends[0]) == embed(ends[0], truncate=None, truncation_direction="right")
    assert embed(ends[0], truncate=True) == embed(ends[0], truncation_direction="Right")
    assert embed(ends[1], truncation_direction="left") == embed(ends[1], truncation_direction="Left")
    assert embed(ends[1], truncation_direction="left") != pytest.approx(embed(ends[1]), abs=1e-4)


@pytest.mark.parametrize(
    ("path", "inputs"),
    [
        ("/tei/embed", {"inputs": TEXTS[:2]}),
        ("/tei/embed_all", {"inputs": TEXTS[:2]}),
        ("/tei/similarity", {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:2]}}),
        ("/tei/v1/embeddings", {"input": TEXTS[:2]}),
    ],
)
def test_headers_tell_what_was_computed(http, path, inputs):
    """Eight headers: a type, and whole numbers; characters are those of the texts, tokens those that the model read."""
    response = http.post(path, json=inputs)
    assert response.status_code == 200, response.text
    assert set(response.headers) >= HEADERS
    assert response.headers["x-compute-type"] in ("cpu+optimized", "gpu+optimized")
    assert all(response.headers[name].isdecimal() for name in HEADERS - {"x-compute-type"})
    assert int(response.headers["x-compute-characters"]) == sum(map(len, TEXTS[:2]))
    tokens = http.post("/tei/tokenize", json={"inputs": TEXTS[:2]}).json()
    assert int(response.headers["x-compute-tokens"]) == sum(map(len, tokens))
    assert response.headers["x-compute-time"] == response.headers["x-total-time"]


def test_embed_all_gives_every_tokens_vector(http):
    """One row a token, special tokens included, for texts and for token ids."""
    tokens = http.post("/tei/tokenize", json={"inputs": TEXTS[:2]}).json()
    ids = [[token["id"] for token in one] for one in tokens]
    made = http.post("/tei/embed_all", json={"inputs": TEXTS[:2]}).json()
    assert [len(rows) for rows in made] == [len(one) for one in tokens]
    assert {len(row) for rows in made for row in rows} == {384}
    for inputs in (TEXTS[0], ids[0]):
        (single,) = http.post("/tei/embed_all", json={"inputs": inputs}).json()
        assert (np.array(single) * made[0]).sum(axis=1).min() > 0.99 * (np.array(made[0]) ** 2).sum(axis=1).min()


def test_similarity_is_the_cosine(http, reference):
    """One number a sentence, in order; the same sentence has 1."""
    inputs = {"source_sentence": TEXTS[0], "sentences": [TEXTS[0], *TEXTS[1:]]}
    cosines = http.post("/tei/similarity", json={"inputs": inputs, "parameters": {"truncate": True}}).json()
    assert cosines[0] == pytest.approx(1.0, abs=1e-5)
    assert cosines[1:] == pytest.approx((reference[1:] @ reference[0]).tolist(), abs=0.02)


def test_the_openai_route_needs_no_model_name(http, reference):
    """/v1/embeddings under /tei, and /embeddings, take any name or none, and answer with the real one."""
    for path, extra in (("/tei/v1/embeddings", {}), ("/tei/embeddings", {"model": "whatever"})):
        reply = http.post(path, json={"input": TEXTS, **extra}).json()
        assert reply["model"] == DEFAULT_MODEL
        assert_same_vectors([item["embedding"] for item in reply["data"]], reference)


def test_tokenize_gives_ids_pieces_and_byte_offsets(http):
    """Offsets are of UTF-8 bytes; special tokens have none, and are left out on request."""
    text = "é cat"
    (tokens,) = http.post("/tei/tokenize", json={"inputs": text}).json()
    assert tokens[0] == {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert tokens[-1]["id"] == 102
    assert [(token["text"], token["start"], token["stop"]) for token in tokens[1:-1]] == [("é", 0, 2), ("cat", 3, 6)]
    assert text.encode()[3:6] == b"cat"
    bare = http.post("/tei/tokenize", json={"inputs": [text, "a"], "add_special_tokens": False}).json()
    assert bare[0] == tokens[1:-1]
    assert len(bare) == 2


def test_decode_gives_the_texts(http):
    """One text a sequence; a bare list is one sequence; special tokens are left out unless they are wanted."""
    (tokens,) = http.post("/tei/tokenize", json={"inputs": "a tide gauge"}).json()
    ids = [token["id"] for token in tokens]
    assert http.post("/tei/decode", json={"ids": ids}).json() == ["a tide gauge"]
    assert http.post("/tei/decode", json={"ids": [ids, ids[1:3]]}).json() == ["a tide gauge", "a tide"]
    (shown,) = http.post("/tei/decode", json={"ids": [ids], "skip_special_tokens": False}).json()
    assert (shown[:5], shown[-5:]) == ("[CLS]", "[SEP]")


@pytest.mark.parametrize("path", ["/tei/health", "/tei", "/tei/", "/tei/ping"])
def test_health_is_empty(http, path):
    """200 with nothing in it."""
    response = http.get(path)
    assert (response.status_code, response.content) == (200, b"")


def test_info_is_teis(http):
    """Every key that TEI's /info has, and the model's true properties."""
    info = http.get("/tei/info").json()
    assert {
        "model_id",
        "model_sha",
        "model_dtype",
        "model_type",
        "max_concurrent_requests",
        "max_input_length",
        "max_batch_tokens",
        "max_batch_requests",
        "max_client_batch_size",
        "auto_truncate",
        "tokenization_workers",
        "version",
    } <= set(info)
    assert (info["model_id"], info["model_type"]) == (DEFAULT_MODEL, {"embedding": {"pooling": "mean"}})
    assert (info["max_input_length"], info["max_client_batch_size"], info["auto_truncate"]) == (256, 2048, True)
    assert info["model_dtype"] in ("float32", "bfloat16", "float16")


# --- errors -------------------------------------------------------------------------------------------------------

SIMILARITY = {"source_sentence": "a", "sentences": ["b"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/tei/embed", {"inputs": []}, 400, "Empty"),
        ("/tei/embed", {"inputs": ""}, 400, "Empty"),
        ("/tei/embed", {"inputs": ["a", ""]}, 400, "Empty"),
        ("/tei/embed", {"inputs": [[]]}, 400, "Empty"),
        ("/tei", {"inputs": ""}, 400, "Empty"),
        ("/tei/embed_all", {"inputs": []}, 400, "Empty"),
        ("/tei/similarity", {"inputs": {**SIMILARITY, "sentences": []}}, 400, "Empty"),
        ("/tei/similarity", {"inputs": {**SIMILARITY, "source_sentence": ""}}, 400, "Empty"),
        ("/tei/tokenize", {"inputs": []}, 400, "Empty"),
        ("/tei/tokenize", {"inputs": ""}, 400, "Empty"),
        ("/tei/decode", {"ids": []}, 400, "Empty"),
        ("/tei/decode", {"ids": [[1], []]}, 400, "Empty"),
        ("/tei/embed", {"inputs": ["a"] * 2049}, 422, "Validation"),
        ("/tei/embed_all", {"inputs": ["a"] * 2049}, 422, "Validation"),
        ("/tei/similarity", {"inputs": {**SIMILARITY, "sentences": ["a"] * 2048}}, 422, "Validation"),
        ("/tei/tokenize", {"inputs": ["a"] * 2049}, 422, "Validation"),
        ("/tei/decode", {"ids": [[1]] * 2049}, 422, "Validation"),
        ("/tei/embed", {"inputs": LONG, "truncate": False}, 422, "Validation"),
        ("/tei/embed_all", {"inputs": ["a", LONG], "truncate": False}, 422, "Validation"),
        ("/tei/embed", {"inputs": "a", "prompt_name": "none such"}, 422, "Validation"),
        ("/tei/tokenize", {"inputs": "a", "prompt_name": "none such"}, 422, "Validation"),
        ("/tei/embed", {"inputs": "a", "dimensions": 128}, 422, "Validation"),
        ("/tei/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "Validation"),
        ("/tei/embed", {"inputs": 5}, 422, "Validation"),
        ("/tei/embed", {}, 422, "Validation"),
        ("/tei/embed", b"{", 422, "Validation"),
        ("/tei/embed", {"inputs": [101, 999_999, 102]}, 422, "Tokenizer"),
        ("/tei/embed", {"inputs": ["a", [30_522]]}, 422, "Tokenizer"),
        ("/tei/decode", {"ids": [30_522]}, 422, "Tokenizer"),
        ("/tei/none_such", {}, 404, "Validation"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_errors_have_teis_status_and_type(http, path, body, status, kind):
    """Two keys: a message, and the type in PascalCase."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error_type"]) == (status, kind), response.text
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error"]


def test_a_body_over_the_limit_is_413(http):
    """As TEI's payload limit."""
    limit = 32 * 1024 * 1024
    response = http.post("/tei/embed", content=b"x" * (limit + 1), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error_type"] == "Validation"


def test_messages_name_the_input_at_fault(http):
    """Which of the inputs is empty, too long or unknown, counted from 0; how many there may be."""
    post = [
        ({"inputs": ["a", ""]}, "inputs.1"),
        ({"inputs": ["a", LONG], "truncate": False}, "inputs.1"),
        ({"inputs": ["a", [30_522]]}, "inputs.1"),
        ({"inputs": ["a"] * 2049}, "batch size 2049 > maximum allowed batch size 2048"),
    ]
    for body, part in post:
        assert part in http.post("/tei/embed", json=body).json()["error"]
