"""What callers of the rerank service get when the scorer raises, gives no number, hangs or is overrun, and when they go away."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx2
import pytest
import redis

from services.rerank.app import create_app
from services.rerank.settings import RerankSettings
from tests.integration.conftest import serving
from tests.redis_server import RedisServer
from tests.rerank_backends import PATIENCE_S, SharingScorer, TroubledScorer

QUERY = "red green blue white"

Open = Callable[..., AbstractAsyncContextManager[httpx2.AsyncClient]]


def service(*backends: TroubledScorer, **settings: object) -> AbstractAsyncContextManager[httpx2.AsyncClient]:
    """Run a service with *backends* and return a client of it."""
    return serving(create_app(RerankSettings(model="fake", **settings), load=lambda _settings: backends))


@pytest.fixture
def backend() -> TroubledScorer:
    """The scorer with troubles."""
    return TroubledScorer()


@pytest.fixture
async def client(backend: TroubledScorer) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a service with that scorer."""
    async with service(backend, max_queue_items=1000) as client:
        backend.batches.clear()
        yield client
        backend.let_go.set()


async def rerank(client: httpx2.AsyncClient, documents: list[str], query: str = QUERY, **headers: str):
    """Rerank, come what may."""
    return await client.post("/rerank", json={"query": query, "documents": documents}, headers=headers)


async def hang(client: httpx2.AsyncClient, backend: TroubledScorer) -> "asyncio.Task[httpx2.Response]":
    """Have the scorer busy until `let_go`."""
    task = asyncio.create_task(rerank(client, ["hang"]))
    await asyncio.to_thread(backend.hangs.wait, PATIENCE_S)
    return task


async def waiting(client: httpx2.AsyncClient, lane: str, documents: int) -> None:
    """Wait until so many documents were let into *lane*; they may still be on their way to the scorer's queue."""
    await measured(client, f"tercet_rerank_{lane}_queue_items {documents}.0")


async def measured(client: httpx2.AsyncClient, line: str) -> None:
    """Wait until /metrics has *line*."""
    async with asyncio.timeout(PATIENCE_S):
        while f"\n{line}\n" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.002)


# --- whose fault it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["poison", "odd"])
async def test_only_the_guilty_request_fails(client, backend, word):
    """A document that the scorer raises on, or gives no number for, fails its request; others in its batches are answered."""
    busy = await hang(client, backend)
    texts = [[f"red {number}", f"word {number}"] for number in range(20)]
    tasks = [asyncio.create_task(rerank(client, each)) for each in (["red", word, "blue"], *texts)]
    await waiting(client, "query", 44)
    backend.let_go.set()
    guilty, *others = await asyncio.gather(*tasks)
    assert (guilty.status_code, guilty.json()["error"]["code"]) == (500, "backend_failed")
    assert "cannot bear" not in guilty.text
    assert [other.status_code for other in others] == [200] * 20
    assert (await busy).status_code == 200
    assert (await client.get("/livez")).status_code == (await client.get("/readyz")).status_code == 200
    assert 'tercet_errors_total{code="backend_failed"} 1.0' in (await client.get("/metrics")).text


async def test_a_document_that_the_device_has_no_room_for(client, backend):
    """It is tried again in smaller batches; alone it is 503, worth another try; the others are answered."""
    busy = await hang(client, backend)
    tasks = [asyncio.create_task(rerank(client, each)) for each in (["huge", "red"], ["green", "blue"])]
    await waiting(client, "query", 5)
    backend.let_go.set()
    guilty, other = await asyncio.gather(*tasks)
    assert (guilty.status_code, guilty.json()["error"]["code"]) == (503, "out_of_memory")
    assert guilty.json()["error"]["retryable"] is True
    assert (await busy).status_code == other.status_code == 200
    assert max(map(len, backend.batches[1:])) == 4
    assert [len(batch) for batch in backend.batches].count(1) >= 2


async def test_a_scorer_that_hangs(backend):
    """Waiters fail when the heartbeat trips, those who come later at once, and the process is to be replaced."""
    async with asyncio.timeout(PATIENCE_S), service(backend, hang_s=0.2) as client:
        busy = await hang(client, backend)
        tasks = [asyncio.create_task(rerank(client, [f"text {number}"])) for number in range(3)]
        replies = await asyncio.gather(busy, *tasks)
        assert [reply.status_code for reply in replies] == [503] * 4
        assert (await rerank(client, ["more"])).status_code == 503
        alive = await client.get("/livez")
        assert (alive.status_code, (await client.get("/readyz")).status_code) == (503, 503)
        assert "hung" in alive.json()["problems"][0]
        backend.let_go.set()


async def test_a_hanging_stage_of_a_cascade(backend):
    """Whichever scorer hangs, the process says so: both share the device."""
    first = TroubledScorer(name="first", fingerprint="first@1")
    first.let_go.set()
    async with asyncio.timeout(PATIENCE_S), service(first, backend, hang_s=0.2) as client:
        assert (await rerank(client, ["hang"])).status_code == 503
        problems = (await client.get("/readyz")).json()["problems"]
        assert any("hung" in problem for problem in problems)
        assert (await rerank(client, ["red"])).status_code == 503
        backend.let_go.set()


# --- time -----------------------------------------------------------------------------------------------------------


async def test_anytime(client, backend):
    """At the deadline those scored come back, best first, and the rest are marked, in the order given; later all is well."""
    documents = [f"red {number}" for number in range(32)] + ["hang"] + [f"green {number}" for number in range(40)]
    reply = await rerank(client, documents, **{"x-deadline-ms": "300"})
    assert reply.status_code == 200
    results = reply.json()["results"]
    scored = [result["index"] for result in results if result["scored"]]
    unscored = [result["index"] for result in results if not result["scored"]]
    assert scored
    assert 32 in unscored
    assert [result["index"] for result in results] == scored + unscored
    assert unscored == sorted(unscored)
    backend.let_go.set()
    whole = (await rerank(client, documents)).json()
    assert all(result["scored"] for result in whole["results"])
    assert whole["usage"]["cached_tokens"] == reply.json()["usage"]["total_tokens"]
    series = (await client.get("/metrics")).text
    assert f'tercet_rerank_documents_total{{outcome="unscored"}} {len(unscored)}.0' in series
    assert f'tercet_rerank_documents_total{{outcome="last"}} {len(scored) + 73}.0' in series
    assert f'tercet_rerank_cache_documents_total{{result="hit"}} {len(scored)}.0' in series


async def test_anytime_in_a_cascade(backend):
    """What the second scorer did not reach has the first one's score, and says so."""
    first = TroubledScorer(name="first", fingerprint="first@1")
    first.let_go.set()
    async with service(first, backend) as client:
        reply = await rerank(client, ["red green hang", "red", "black"], **{"x-deadline-ms": "300"})
        results = reply.json()["results"]
        assert [(result["index"], result["stage"]) for result in results] == [(0, "first"), (1, "first"), (2, "first")]
        assert all(result["scored"] and 0 <= result["score"] <= 0.5 for result in results)
        backend.let_go.set()
        results = (await rerank(client, ["red green", "red", "black"])).json()["results"]
        assert {result["stage"] for result in results} == {"last"}


# --- many at once ---------------------------------------------------------------------------------------------------


async def test_a_thousand_documents_do_not_hold_up_ten(client, backend):
    """Ten documents that come while a thousand wait are answered long before them."""
    busy = await hang(client, backend)
    many = [f"word{number} " + "x " * 100 for number in range(900)]
    long = asyncio.create_task(rerank(client, many))
    await waiting(client, "bulk", 900)
    short = asyncio.create_task(rerank(client, [f"red {number}" for number in range(10)]))
    await waiting(client, "query", 11)
    backend.let_go.set()
    assert [reply.status_code for reply in await asyncio.gather(short, long, busy)] == [200] * 3
    lengths = [len(window.document.ids) for window in backend.scored if window.document is not None]
    assert lengths.count(2) == 10
    assert 2 not in lengths[450:]


async def test_identical_pairs_are_computed_once(client, backend):
    """Twenty callers who ask the same while the scorer is busy cost what one does, and all are answered alike."""
    busy = await hang(client, backend)
    tasks = [asyncio.create_task(rerank(client, ["red", "red green"])) for _ in range(20)]
    await measured(client, 'tercet_rerank_coalesced_items_total{lane="query"} 38.0')
    backend.let_go.set()
    replies = [reply.json()["results"] for reply in await asyncio.gather(*tasks)]
    assert all(reply == replies[0] for reply in replies)
    await busy
    assert len(backend.scored) == 3


async def test_who_goes_away_leaves_the_queue(client, backend):
    """Work of a caller who is gone is dropped before the scorer sees it."""
    busy = await hang(client, backend)
    gone = asyncio.create_task(rerank(client, [f"text {number}" for number in range(500)]))
    await waiting(client, "bulk", 500)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await waiting(client, "bulk", 0)
    backend.let_go.set()
    assert (await busy).status_code == 200
    assert (await rerank(client, ["red"])).status_code == 200
    assert len(backend.scored) == 2


async def test_a_full_queue_refuses_at_once(client, backend):
    """429 with Retry-After for what does not fit, no work done for it; what was let in is answered."""
    busy = await hang(client, backend)
    let_in = asyncio.create_task(rerank(client, [f"text {number}" for number in range(1000)]))
    await waiting(client, "bulk", 1000)
    refused = await rerank(client, [f"more {number}" for number in range(101)])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    backend.let_go.set()
    assert [reply.status_code for reply in await asyncio.gather(busy, let_in)] == [200, 200]


# --- Redis ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_settings(redis_server: RedisServer) -> dict[str, object]:
    """Settings with an empty Redis, and a breaker that tries again soon."""
    with redis.Redis.from_url(redis_server.url) as store:
        store.flushall()
    return {"REDIS_URL": redis_server.url, "breaker_reset_s": 0.02}


async def test_processes_share_scores(redis_settings):
    """What one process scored another finds, in one look-up; what is kept has an end."""
    documents = [f"red {number}" for number in range(20)]
    async with service(TroubledScorer(), **redis_settings) as client:
        made = (await rerank(client, documents)).json()
    other = TroubledScorer()
    async with service(other, **redis_settings) as client:
        other.batches.clear()
        with redis.Redis.from_url(str(redis_settings["REDIS_URL"])) as store:
            store.config_resetstat()
            found = (await rerank(client, documents)).json()
            calls = {name: row["calls"] for name, row in store.info("commandstats").items()}
            assert calls["cmdstat_mget"] == 1
            keys = store.keys("tercet:score:*")
            assert len(keys) >= 20
            assert all(store.pttl(key) > 0 for key in keys)
    assert other.batches == []
    assert found["results"] == made["results"]
    assert found["usage"]["cached_tokens"] == made["usage"]["total_tokens"]


async def test_processes_share_token_vectors(redis_settings):
    """A document that one process encoded another scores for another query without encoding it."""
    documents = [f"red {number}" for number in range(20)]
    async with service(SharingScorer(), **redis_settings) as client:
        await rerank(client, documents)
    other = SharingScorer()
    async with service(other, **redis_settings) as client:
        other.taken.clear()
        assert (await rerank(client, documents, query="another")).status_code == 200
    assert len(other.taken) == 20


async def test_losing_redis_loses_no_answer(redis_settings, redis_server):
    """Killed between two requests, Redis is missed and nothing else happens."""
    async with service(TroubledScorer(), score_cache_bytes=1, **redis_settings) as client:
        made = (await rerank(client, ["red", "green"])).json()["results"]
        redis_server.kill()
        try:
            for _ in range(5):
                reply = await rerank(client, ["red", "green"])
                assert reply.json()["results"] == made
        finally:
            redis_server.start()
        assert (await client.get("/readyz")).status_code == 200
