"""What callers get when the model raises, hangs, runs out of memory or is overrun, and when they go away."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from services.embedding.app import create_app
from services.embedding.settings import EmbeddingSettings
from tests.embedding_backends import TroubledBackend
from tests.integration.conftest import serving


@pytest.fixture
def backend() -> TroubledBackend:
    """The model with troubles."""
    return TroubledBackend()


@pytest.fixture
async def client(backend: TroubledBackend) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with that model."""
    settings = EmbeddingSettings(model="fake", max_queue_items=2048)
    async with serving(create_app(settings, load=lambda _spec, _settings: [backend])) as client:
        yield client
        backend.let_go.set()


async def embed(client: httpx2.AsyncClient, inputs: str | list[str], **headers: str) -> httpx2.Response:
    """Embed, come what may."""
    return await client.post("/embed", json={"inputs": inputs}, headers=headers)


async def test_only_the_guilty_request_fails(client):
    """A text that the model cannot bear fails its request, by name; requests in the same batches are answered."""
    texts = [[f"text {number}", f"word {number}"] for number in range(20)]
    guilty, *others = await asyncio.gather(
        embed(client, ["red", "green", "poison", "blue"]), *(embed(client, each) for each in texts)
    )
    assert guilty.status_code == 500
    error = guilty.json()["error"]
    assert (error["code"], error["param"]) == ("backend_failed", "inputs.2")
    assert "cannot bear" not in error["message"]
    assert [other.status_code for other in others] == [200] * 20
    assert (await client.get("/livez")).status_code == 200


async def test_a_text_that_the_device_has_no_room_for(client):
    """503, worth another try; the others are answered."""
    guilty, other = await asyncio.gather(embed(client, ["huge", "red"]), embed(client, ["green", "blue"]))
    assert (guilty.status_code, guilty.json()["error"]["code"]) == (503, "out_of_memory")
    assert guilty.json()["error"]["retryable"] is True
    assert other.status_code == 200


async def test_a_model_that_hangs(backend):
    """Waiters fail at once when the heartbeat trips, those who come later too, and the process is to be replaced."""
    settings = EmbeddingSettings(model="fake", hang_s=0.2)
    app = create_app(settings, load=lambda _spec, _settings: [backend])
    async with asyncio.timeout(10), serving(app) as client:
        hanging = asyncio.create_task(embed(client, "hang"))
        await asyncio.to_thread(backend.hangs.wait, 10)
        waiting = [asyncio.create_task(embed(client, f"text {number}")) for number in range(3)]
        replies = await asyncio.gather(hanging, *waiting)
        assert [reply.status_code for reply in replies] == [503] * 4
        assert (await embed(client, "more")).status_code == 503
        alive = await client.get("/livez")
        assert (alive.status_code, (await client.get("/readyz")).status_code) == (503, 503)
        assert "hung" in alive.json()["problems"][0]
        backend.let_go.set()


async def test_a_full_queue_refuses_at_once(client, backend):
    """429 with Retry-After for what does not fit, no work done for it; what was let in is answered."""
    hanging = asyncio.create_task(embed(client, "hang"))
    await asyncio.to_thread(backend.hangs.wait, 10)
    let_in = asyncio.create_task(embed(client, [f"text {number}" for number in range(2048)]))
    while "bulk_queue_items 2048.0" not in (await client.get("/metrics")).text:
        await asyncio.sleep(0.001)
    before = len(backend.batches)
    refused = await embed(client, ["one", "more"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert len(backend.batches) == before
    backend.let_go.set()
    assert [reply.status_code for reply in await asyncio.gather(hanging, let_in)] == [200, 200]


async def test_who_goes_away_leaves_the_queue(client, backend):
    """Work of a caller who is gone is dropped before the model sees it."""
    hanging = asyncio.create_task(embed(client, "hang"))
    await asyncio.to_thread(backend.hangs.wait, 10)
    gone = asyncio.create_task(embed(client, [f"text {number}" for number in range(500)]))
    while "bulk_queue_items 500.0" not in (await client.get("/metrics")).text:
        await asyncio.sleep(0.001)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert "bulk_queue_items 0.0" in (await client.get("/metrics")).text
    before = sum(backend.batches)
    backend.let_go.set()
    assert (await hanging).status_code == 200
    assert (await embed(client, "red")).status_code == 200
    assert sum(backend.batches) == before + 1


async def test_a_very_long_text_stalls_nobody(client):
    """While five million characters are tokenised in a thread of their own, short queries are answered."""
    long = asyncio.create_task(embed(client, "word " * 1_000_000))
    answered = 0
    while not long.done():
        assert (await embed(client, f"red {answered}")).status_code == 200
        answered += 1
    reply = (await long).json()
    assert reply["data"][0]["truncated"]
    assert answered >= 1
