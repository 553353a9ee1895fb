"""The embedding service with a Redis: shared between processes, one round trip, and its loss no error."""

import asyncio

import httpx2
import pytest
import redis

from services.embedding.app import create_app
from services.embedding.settings import EmbeddingSettings
from tests.embedding_backends import TroubledBackend
from tests.integration.conftest import serving
from tests.redis_server import RedisServer

TEXTS = [f"text {number}" for number in range(32)]


@pytest.fixture
def settings(redis_server: RedisServer) -> EmbeddingSettings:
    """Settings with an empty Redis, and a breaker that tries again soon."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return EmbeddingSettings(model="fake", REDIS_URL=redis_server.url, breaker_reset_s=0.02)  # type: ignore[call-arg]


def app_of(settings: EmbeddingSettings, backend: TroubledBackend):
    """Return a service with *backend*."""
    return create_app(settings, load=lambda _spec, _settings: [backend])


async def embed(client: httpx2.AsyncClient, inputs: list[str]) -> dict:
    """Embed, which must succeed."""
    response = await client.post("/embed", json={"inputs": inputs, "encoding": "base64"})
    assert response.status_code == 200, response.text
    return response.json()


async def test_processes_share_vectors(settings, redis_server):
    """What one process computed another finds, to the bit: one MGET, no work, and keys that expire."""
    one, other = TroubledBackend(), TroubledBackend()
    async with serving(app_of(settings, one)) as client:
        made = await embed(client, TEXTS)
    async with serving(app_of(settings, other)) as client:
        other.batches.clear()
        with redis.Redis.from_url(redis_server.url) as store:
            store.config_resetstat()
            found = await embed(client, TEXTS)
            calls = {name: row["calls"] for name, row in store.info("commandstats").items()}
            assert calls["cmdstat_mget"] == 1
            assert "cmdstat_set" not in calls
            assert all(store.pttl(key) > 0 for key in store.keys("tercet:vector:*"))
    assert other.batches == []
    assert found["data"] == made["data"]
    assert found["usage"]["cached_tokens"] == found["usage"]["total_tokens"] == 64


async def test_losing_redis_loses_no_answer(settings, redis_server):
    """Killed between two requests, Redis is missed and nothing else happens."""
    async with serving(app_of(settings, TroubledBackend())) as client:
        made = await embed(client, TEXTS)
        redis_server.kill()
        try:
            for _ in range(5):
                again = await embed(client, TEXTS)
                assert again["data"] == made["data"]
                assert again["usage"]["cached_tokens"] == 0
            assert (await client.get("/readyz")).status_code == 200
        finally:
            redis_server.start()


async def test_a_stampede_computes_once(settings):
    """Many callers of the same cold text cost the model one text."""
    backend = TroubledBackend()
    async with serving(app_of(settings, backend)) as client:
        backend.batches.clear()
        replies = await asyncio.gather(*(embed(client, ["red green blue"]) for _ in range(30)))
    assert sum(backend.batches) == 1
    assert len({reply["data"][0]["embedding"] for reply in replies}) == 1


async def test_no_cache_where_it_is_off(settings):
    """cache_bytes=0 computes every text anew, with a Redis or without."""
    backend = TroubledBackend()
    async with serving(app_of(settings.model_copy(update={"cache_bytes": 0}), backend)) as client:
        await embed(client, ["red"])
        backend.batches.clear()
        assert (await embed(client, ["red"]))["usage"]["cached_tokens"] == 0
        assert sum(backend.batches) == 1
