"""
The services under /api/v1 over plain HTTP, and what each dialect answers when a model fails.

The failing models run in this process, behind the real app; the rest asks one service over a real socket.
"""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx2
import numpy as np
import pytest

from services.common.model_files import DEFAULT_MODEL
from services.common.tokens import Tokens
from services.embedding.app import create_app
from services.embedding.backends.fake import FakeBackend
from services.embedding.settings import EmbeddingSettings
from tests.contract.conftest import TEXTS, assert_same_vectors

LONG = "a tide gauge " * 200
slow = pytest.mark.slow

# --- the TEI derivative -------------------------------------------------------------------------------------------


@slow
def test_api_embed_takes_one_text_or_several(http, reference):
    """Vectors with their index, usage, and durations with their unit."""
    reply = http.post("/api/v1/embed", json={"inputs": TEXTS}).json()
    assert set(reply) == {"data", "usage", "timings"}
    assert [item["index"] for item in reply["data"]] == list(range(len(TEXTS)))
    assert_same_vectors([item["embedding"] for item in reply["data"]], reference)
    one = http.post("/api/v1/embed", json={"inputs": "a cat"}).json()
    assert one["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert set(one["timings"]) == {"tokenization", "queue", "inference"}
    assert all(re.fullmatch(r"\d+(µs|ms)", duration) for duration in one["timings"].values())


@slow
def test_api_embeds_options_are_those_of_tei(http, reference):
    """`truncation_direction` in its spelling, `normalize`, `truncate` and `dimensions`; null is the default."""
    options = {
        "truncate": None,
        "truncation_direction": "Right",
        "prompt_name": None,
        "normalize": True,
        "dimensions": 384,
    }
    reply = http.post("/api/v1/embed", json={"inputs": TEXTS, **options, "unknown": 1}).json()
    assert_same_vectors([item["embedding"] for item in reply["data"]], reference)
    sides = [
        http.post("/api/v1/embed", json={"inputs": LONG + " calm sea", "truncation_direction": side}).json()
        for side in ("Left", "Right")
    ]
    assert sides[0]["data"] != sides[1]["data"]


@slow
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"inputs": []}, 422, "empty_input"),
        ({"inputs": ""}, 422, "empty_input"),
        ({"inputs": ["a", ""]}, 422, "empty_input"),
        ({"inputs": ["a"] * 2049}, 413, "too_large"),
        ({"inputs": LONG, "truncate": False}, 422, "context_too_long"),
        ({"inputs": "a", "prompt_name": "none such"}, 422, "invalid_input"),
        ({"inputs": "a", "dimensions": 128}, 422, "invalid_input"),
        ({"inputs": "a", "truncation_direction": "up"}, 422, "invalid_input"),
        ({"inputs": 5}, 422, "invalid_input"),
        ({}, 422, "invalid_input"),
        ([], 400, "malformed_request"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_api_embeds_errors_are_flat(http, body, status, code):
    """A description, and a stable word for programs."""
    response = http.post("/api/v1/embed", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.json()["error"] == response.json()["message"] != ""


# --- the E5 service -----------------------------------------------------------------------------------------------


@slow
def test_the_e5_routes_answer_in_their_shapes(http, reference):
    """A query's vector; a batch's vectors, in order; a message."""
    one = http.post("/api/v1/embeddings/embed", json={"text": TEXTS[0]}).json()
    assert set(one) == {"vector"}
    assert_same_vectors([one["vector"]], reference[:1])
    for extra in ({}, {"is_query": True}, {"is_query": False}):
        many = http.post("/api/v1/embeddings/embed_batch", json={"texts": TEXTS, **extra}).json()
        assert set(many) == {"vectors"}
        assert_same_vectors(many["vectors"], reference)
    for path in ("/api/v1/embeddings/", "/api/v1/embeddings"):
        reply = http.get(path)
        assert (reply.status_code, set(reply.json())) == (200, {"message"})
        assert DEFAULT_MODEL in reply.json()["message"]


@slow
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("embed", {"text": ""}, 422),
        ("embed", {}, 422),
        ("embed", {"text": ["a"]}, 422),
        ("embed_batch", {"texts": []}, 422),
        ("embed_batch", {"texts": ["a", ""]}, 422),
        ("embed_batch", {"texts": ["a"] * 2049}, 413),
        ("embed_batch", {"texts": ["a"], "is_query": "yes"}, 422),
        ("none_such", {}, 404),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_e5_routes_refuse_bad_input(http, path, body, status):
    """Every fault is a flat object with a description."""
    response = http.post(f"/api/v1/embeddings/{path}", json=body)
    assert response.status_code == status
    assert set(response.json()) == {"error", "code", "message"}


# --- models of the tests' own -------------------------------------------------------------------------------------


class Prompted(FakeBackend):
    """A model that wants a text before queries and another before passages."""

    @property
    def info(self):
        return replace(super().info, prompts={"query": "ask ", "document": "tell ", "other": "else "})


class Faulty(FakeBackend):
    """Raises *error* for any text in which the word `poison` is; waits at the word `wait` until *go* is set."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.reached = threading.Event()
        self.go = threading.Event()

    def forward(self, batch: Sequence[Tokens]):
        read = {word for one in batch for word in self.decode(one.ids).split()}
        if "wait" in read:
            self.reached.set()
            self.go.wait(timeout=30)
        if self.error is not None and "poison" in read:
            raise self.error
        return super().forward(batch)


@asynccontextmanager
async def serving(backend: FakeBackend, **settings: int) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve *backend* behind the real app, in this process."""
    app = create_app(EmbeddingSettings(model="fake", **settings), load=lambda _spec, _settings: [backend])
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://service", timeout=60) as client,
    ):
        yield client


async def test_prompts_go_before_texts_and_never_before_token_ids():
    """The E5 service's queries and passages get their prompts; TEI's get the one they name; ids get none."""
    async with serving(Prompted()) as client:

        async def vectors(path: str, **body) -> list[list[float]]:
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            return response.json()

        bare = np.array(await vectors("/tei/embed", inputs=["ask tides", "tell tides", "else tides", "tides"]))
        assert np.allclose((await vectors("/api/v1/embeddings/embed", text="tides"))["vector"], bare[0], atol=1e-6)
        for is_query, expected in ((True, bare[0]), (False, bare[1])):
            batch = await vectors("/api/v1/embeddings/embed_batch", texts=["tides"], is_query=is_query)
            assert np.allclose(batch["vectors"], expected[None], atol=1e-6)
        assert np.allclose(await vectors("/tei/embed", inputs="tides", prompt_name="other"), bare[2:3], atol=1e-6)
        derivative = await vectors("/api/v1/embed", inputs="tides", prompt_name="query")
        assert np.allclose(derivative["data"][0]["embedding"], bare[0], atol=1e-6)
        (tokens,) = await vectors("/tei/tokenize", inputs="tides", prompt_name="query")
        assert [(token["text"], token["start"]) for token in tokens] == [("ask", 0), ("tides", 4)]
        ids = [token["id"] for token in tokens[1:]]
        assert np.allclose(await vectors("/tei/embed", inputs=[ids], prompt_name="other"), bare[3:], atol=1e-6)


async def test_tokens_of_other_scripts_have_byte_offsets():
    """With a prompt before the text, offsets are of the bytes of both."""
    async with serving(Prompted()) as client:
        (tokens,) = (await client.post("/tei/tokenize", json={"inputs": "é 東京 a", "prompt_name": "query"})).json()
    read = "ask é 東京 a".encode()
    assert [read[token["start"] : token["stop"]].decode() for token in tokens] == ["ask", "é", "東京", "a"]


async def test_a_model_that_fails_is_told_in_each_dialect():
    """TEI's Backend 424, a flat 500, OpenAI's server error; the next request is served."""
    async with serving(Faulty(RuntimeError("broken"))) as client:
        tei = await client.post("/tei/embed", json={"inputs": "poison"})
        assert (tei.status_code, tei.json()["error_type"]) == (424, "Backend")
        assert (await client.post("/tei/embed_all", json={"inputs": "fine"})).status_code == 200
        plain = await client.post("/api/v1/embed", json={"inputs": "poison"})
        assert (plain.status_code, plain.json()["code"]) == (500, "backend_failed")
        openai = await client.post("/v1/embeddings", json={"input": "poison", "model": "fake"})
        assert (openai.status_code, openai.json()["error"]["type"]) == (500, "server_error")
        assert (await client.post("/tei/embed", json={"inputs": "good"})).status_code == 200


async def test_a_device_without_memory_is_unhealthy_for_now():
    """503, to be tried again: TEI's Unhealthy."""
    async with serving(Faulty(MemoryError())) as client:
        tei = await client.post("/tei/embed", json={"inputs": "poison"})
        assert (tei.status_code, tei.json()["error_type"]) == (503, "Unhealthy")
        openai = await client.post("/v1/embeddings", json={"input": "poison", "model": "fake"})
        assert openai.status_code == 503
        assert int(openai.headers["retry-after"]) >= 1


async def test_a_service_at_its_limit_is_overloaded_in_each_dialect():
    """429 with Retry-After while as many requests are under way as may be."""
    backend = Faulty()
    async with serving(backend, max_concurrent_requests=1) as client:
        first = asyncio.create_task(client.post("/tei/embed", json={"inputs": "wait"}))
        assert await asyncio.to_thread(backend.reached.wait, 30)
        answers = [
            await client.post("/tei/embed", json={"inputs": "a"}),
            await client.post("/api/v1/embed", json={"inputs": "a"}),
            await client.post("/v1/embeddings", json={"input": "a", "model": "fake"}),
        ]
        backend.go.set()
        assert (await first).status_code == 200
    assert [answer.status_code for answer in answers] == [429, 429, 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert answers[0].json()["error_type"] == "Overloaded"
    assert answers[1].json()["code"] == "overloaded"
    assert answers[2].json()["error"]["type"] == "rate_limit_error"


async def test_a_service_that_is_not_ready_is_unhealthy():
    """Before the models are there TEI's health and routes answer 503 Unhealthy."""
    app = create_app(EmbeddingSettings(model="fake"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://service") as client:
        for response in (await client.get("/tei/health"), await client.post("/tei/embed", json={"inputs": "a"})):
            assert (response.status_code, response.json()["error_type"]) == (503, "Unhealthy")


async def test_long_texts_are_refused_where_that_is_the_setting():
    """`auto_truncate` false refuses what a request does not ask to be cut, in every dialect."""
    async with serving(FakeBackend(), auto_truncate=False) as client:
        tei = await client.post("/tei/embed", json={"inputs": LONG})
        assert (tei.status_code, tei.json()["error_type"]) == (422, "Validation")
        assert (await client.post("/tei/embed", json={"inputs": LONG, "truncate": True})).status_code == 200
        openai = await client.post("/v1/embeddings", json={"input": LONG, "model": "fake"})
        assert (openai.status_code, openai.json()["error"]["code"]) == (400, "context_too_long")
        assert (await client.post("/api/v1/embed", json={"inputs": LONG})).status_code == 422
        assert (await client.get("/tei/info")).json()["auto_truncate"] is False
