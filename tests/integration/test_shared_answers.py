"""The result cache of several routers: one real Redis between them, and one real PostgreSQL ledger behind them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import redis

from services.common.breaker import Breaker
from services.common.deadline import Deadline
from services.common.errors import DependencyUnavailable
from services.common.key_value import KeyValueStore
from services.common.wire.search import (
    CacheReply,
    Coverage,
    PipelineReply,
    SearchReply,
    SearchRequest,
    ShardCoverage,
)
from services.search.answer import Answer
from services.search.cache import CLAIM_PREFIX, KEY_PREFIX, MemoryResultCache, RedisResultCache
from services.search.kept_answers import CacheNotes, KeptAnswers, Look
from services.search.ledger.postgres import PostgresLedger
from services.search.ports import Collection, Ledger
from services.search.run import Run
from services.search.watermarks import SharedWatermarks, watermarks_of
from tests.contract.ledger_contract import make_collection, make_document
from tests.postgres_server import PostgresServer, new_schema
from tests.redis_server import RedisServer
from tests.search_ports import BOOKS, SEQ, MemoryLedger

PATIENCE_S = 20.0


class Notes(CacheNotes):
    """Counts what is noted."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.others: list[str] = []

    def looked(self, outcome: str, age_s: float | None) -> None:
        self.outcomes.append(outcome)

    def joined(self, where: str) -> None:
        self.others.append(where)


class Router:
    """One router process's cache; its pipeline answers with what *ledger* has, once `gate` is open."""

    def __init__(self, ledger: Ledger, url: str | None, collection: Collection = BOOKS) -> None:
        self.ledger, self.collection, self.notes = ledger, collection, Notes()
        self.breaker = Breaker("redis", min_calls=3, reset_s=0.05)
        self.shared = None if url is None else RedisResultCache(KeyValueStore(url, self.breaker), ttl_s=60.0)
        self.watermarks = watermarks_of(ledger)
        self.kept = KeptAnswers(
            MemoryResultCache(max_bytes=1 << 20, ttl_s=60.0),
            self.watermarks,
            ledger,
            ["settings"],
            stale_if_error_s=60.0,
            shared=self.shared,
            notes=self.notes,
        )
        self.made = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.reply: Callable[[], Awaitable[SearchReply]] = self._reply

    async def _reply(self) -> SearchReply:
        as_of = self.ledger.heard_seq(self.collection.uuid)
        return SearchReply(
            collection="books",
            hits=[],
            coverage=Coverage(ratio=1.0, shards=ShardCoverage(total=1, ok=1)),
            degraded=[],
            pipeline=PipelineReply(retrieval="lexical"),
            cache=CacheReply(hit=False),
            as_of=as_of,
            timings_ms={},
        )

    async def _make(self) -> SearchReply:
        self.made += 1
        self.began.set()
        reply = await self.reply()
        await self.gate.wait()
        return reply

    def run(self, query: str, **fields: object) -> Run:
        request = SearchRequest.model_validate({"query": query, "mode": "lexical", **fields})
        return Run(request, self.collection, Deadline.after(PATIENCE_S), lambda _stage, _seconds: None, "lexical")

    async def look(self, query: str, **fields: object) -> Look:
        return await self.kept.look(self.run(query, **fields))

    async def ask(self, query: str, **fields: object) -> Answer:
        run = self.run(query, **fields)
        look = await self.kept.look(run)
        return look.fresh or await self.kept.once(run, look, self._make)

    async def aclose(self) -> None:
        await self.kept.aclose()
        await self.watermarks.aclose()
        if self.shared is not None:
            await self.shared.aclose()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


class TestOneRedis:
    """Two routers that see the same ledger, with a Redis between them."""

    @pytest.fixture
    def routers(self, redis_server: RedisServer, stack: AsyncExitStack) -> list[Router]:
        with redis.Redis.from_url(redis_server.url) as client:
            client.flushall()
        ledger: Ledger = MemoryLedger()  # type: ignore[assignment]
        routers = [Router(ledger, redis_server.url) for _ in range(2)]
        for router in routers:
            stack.push_async_callback(router.aclose)
        return routers

    async def test_what_one_made_is_a_hit_for_the_other(self, routers: list[Router]) -> None:
        """The second finds it in Redis, and then in its own memory."""
        first, second = routers
        await first.ask("why")
        await first.kept.aclose()
        answers = [await second.ask("why") for _ in range(2)]
        assert all(answer.cache.hit for answer in answers)
        assert (second.made, second.notes.outcomes) == (0, ["redis", "memory"])

    async def test_one_makes_it_and_the_other_waits(self, routers: list[Router]) -> None:
        """The same question to both at the same time runs once; the other router takes the entry, a hit."""
        first, second = routers
        first.gate.clear()
        leading = asyncio.create_task(first.ask("why"))
        await first.began.wait()
        waiting = [asyncio.create_task(second.ask("why")) for _ in range(5)]
        await asyncio.sleep(0.02)
        first.gate.set()
        assert not (await leading).cache.hit
        assert all(answer.cache.hit for answer in await asyncio.gather(*waiting))
        assert (first.made, second.made, second.notes.others.count("other")) == (1, 0, 1)

    async def test_a_slow_leader_keeps_its_claim(self, routers: list[Router]) -> None:
        """An answer that takes longer than a claim lasts is still made once: the claim is extended."""
        first, second = routers
        first.gate.clear()
        leading = asyncio.create_task(first.ask("why"))
        await first.began.wait()
        waiting = asyncio.create_task(second.ask("why"))
        await asyncio.sleep(0.6)
        first.gate.set()
        await asyncio.gather(leading, waiting)
        assert (first.made, second.made) == (1, 0)

    async def test_a_leader_that_dies_costs_little(self, routers: list[Router], redis_server: RedisServer) -> None:
        """The claim of a process that is gone runs out, and the other makes the answer itself."""
        _, second = routers
        key = (await second.look("why")).key
        with redis.Redis.from_url(redis_server.url) as client:
            client.set(f"{CLAIM_PREFIX}{key}", b"1", px=300)
        answer = await second.ask("why")
        assert (answer.cache.hit, second.made) == (False, 1)

    async def test_a_leader_that_fails_holds_nobody_up(self, routers: list[Router]) -> None:
        """When the leader's pipeline raises, its claim goes at once; the other router tries for itself."""
        first, second = routers

        async def down() -> SearchReply:
            raise DependencyUnavailable("down")

        first.reply = down
        first.gate.clear()
        with pytest.raises(DependencyUnavailable):
            await first.ask("why")
        await first.kept.aclose()
        assert not (await second.ask("why")).cache.hit
        assert (first.made, second.made, second.notes.others) == (1, 1, [])

    async def test_a_leader_whose_caller_leaves_holds_nobody_up(self, routers: list[Router]) -> None:
        """A cancelled search lets its claim go."""
        first, second = routers
        first.gate.clear()
        leading = asyncio.create_task(first.ask("why"))
        await first.began.wait()
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        while first.kept.flights or first.kept._settling:
            await asyncio.sleep(0.001)
        await second.ask("why")
        assert (second.made, second.notes.others) == (1, [])

    async def test_a_redis_that_takes_no_writes_is_read_on(
        self, routers: list[Router], redis_server: RedisServer
    ) -> None:
        """As a replica, or full: what it has are hits, what it cannot keep is made again, and nothing is degraded."""
        first, second = routers
        await first.ask("kept")
        await first.kept.aclose()
        with redis.Redis.from_url(redis_server.url) as client:
            client.replicaof("127.0.0.1", 1)
            client.config_set("replica-serve-stale-data", "yes")
            try:
                assert (await second.ask("kept")).cache.hit
                answers = [await second.ask(f"new {number}") for number in range(5)]
                await second.kept.aclose()
                assert [answer.degraded for answer in answers] == [[]] * 5
                assert not (await first.look("new 0")).fresh
            finally:
                client.replicaof("NO", "ONE")
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
            try:
                assert (await second.ask("other")).degraded == []
                await second.kept.aclose()
            finally:
                client.config_set("maxmemory", "0")
        assert second.breaker.state == "closed"

    async def test_entries_that_vanish_are_made_again(self, routers: list[Router], redis_server: RedisServer) -> None:
        """Evicted or flushed between two searches: a miss for who has it not in memory, and no error."""
        first, second = routers
        await first.ask("why")
        await first.kept.aclose()
        with redis.Redis.from_url(redis_server.url) as client:
            client.flushall()
        assert not (await second.ask("why")).cache.hit
        assert (await first.ask("why")).cache.hit

    async def test_garbage_under_our_keys_is_a_miss(self, routers: list[Router], redis_server: RedisServer) -> None:
        """Of another type or of other bytes: the search is made, and the next one of this router is a hit."""
        first, second = routers
        await first.ask("why")
        await first.kept.aclose()
        key = (await first.look("why")).key
        with redis.Redis.from_url(redis_server.url) as client:
            raw = client.get(f"{KEY_PREFIX}{key}")
            assert isinstance(raw, bytes)
            client.set(f"{KEY_PREFIX}{key}", raw[:-1] + b"!")
            client.rpush(f"{CLAIM_PREFIX}{key}", "somebody else's")
        assert not (await second.ask("why")).cache.hit
        assert (await second.ask("why")).cache.hit

    async def test_a_frozen_redis_is_named_and_costs_little(
        self, routers: list[Router], redis_server: RedisServer
    ) -> None:
        """Searches are answered without it, flagged; what this process kept is a hit as ever; afterwards it is used again."""
        first, _ = routers
        redis_server.freeze()
        try:
            answers = [await first.ask(f"question {number}") for number in range(5)]
            assert all(answer.degraded == ["cache_unavailable"] for answer in answers)
            assert (await first.ask("question 0")).cache.hit
        finally:
            redis_server.thaw()
        async with asyncio.timeout(PATIENCE_S):
            while (await first.ask("new question", max_stale_s=0.0, k=first.made + 1)).degraded:
                await asyncio.sleep(0.02)


class TestOneLedger:
    """Two routers with a PostgreSQL between them, and a Redis or none."""

    @pytest.fixture(params=["with Redis", "without"])
    async def routers(
        self,
        request: pytest.FixtureRequest,
        postgres_server: PostgresServer,
        redis_server: RedisServer,
        stack: AsyncExitStack,
    ) -> list[Router]:
        url = new_schema(postgres_server.url())
        collection = make_collection()
        routers = []
        for _ in range(2):
            ledger = await PostgresLedger.open(url, breaker=Breaker("ledger", reset_s=0.1))
            stack.push_async_callback(ledger.aclose)
            if not routers:
                await ledger.create_collection(collection)
            routers.append(Router(ledger, redis_server.url if request.param == "with Redis" else None, collection))
            stack.push_async_callback(routers[-1].aclose)
        return routers

    async def test_no_answer_from_before_an_acknowledged_write(self, routers: list[Router]) -> None:
        """
        After a write through one router the other never gives what it kept before, and gives it where staleness is allowed.

        Nothing is awaited between the acknowledgement and the question: no announcement need have arrived.
        """
        a, b = routers
        for turn in range(1, 21):
            written = await a.ledger.append(a.collection.uuid, [make_document(f"d{turn}")])
            look = await b.look("why")
            assert look.fresh is None
            if turn > 1:
                assert (look.decision, look.watermark) == ("moved", written.seq)
                assert (await b.look("why", max_stale_s=60)).fresh is not None
            await b.ledger.state(b.collection.uuid)
            assert (await b.ask("why")).reply().as_of == written.seq
            again = await b.ask("why")
            assert again.cache.hit

    async def test_reads_of_the_watermark_are_shared(self, routers: list[Router]) -> None:
        """A hundred searches at once read it a few times, and each a value from after it asked."""
        a, b = routers
        await a.ledger.append(a.collection.uuid, [make_document("d")])
        asked = 0
        state = b.ledger.state

        async def counted(uuid: str) -> object:
            nonlocal asked
            asked += 1
            return await state(uuid)

        b.ledger.state = counted  # type: ignore[method-assign,assignment]
        found = await asyncio.gather(*(b.watermarks.read(b.collection, Deadline.after(5.0)) for _ in range(100)))
        assert found == [1] * 100
        assert asked <= 2

    async def test_a_ledger_that_cannot_be_asked(self, routers: list[Router], postgres_server: PostgresServer) -> None:
        """While it is frozen nothing is proven: kept answers are spare, and given where staleness is allowed."""
        _, b = routers
        await b.ask("why")
        assert (await b.ask("why")).cache.hit
        postgres_server.freeze()
        try:
            looks = [await b.look("why") for _ in range(20)]
            assert {(look.decision, look.fresh) for look in looks} == {("unproven", None)}
            assert all(look.spare is not None and look.spare.degraded == ("stale",) for look in looks)
            assert (await b.look("why", max_stale_s=60)).fresh is not None
        finally:
            postgres_server.thaw()
        async with asyncio.timeout(PATIENCE_S):
            while (await b.look("why")).fresh is None:
                await asyncio.sleep(0.02)


async def test_nobody_shares_a_read_that_began_before(stack: AsyncExitStack) -> None:
    """A read under way may have seen the ledger before a write: who asks after that write waits for the next read."""
    ledger = MemoryLedger()
    gate, begun, state = asyncio.Event(), asyncio.Event(), ledger.state

    async def slow(uuid: str) -> object:
        found = await state(uuid)
        begun.set()
        await gate.wait()
        return found

    ledger.state = slow  # type: ignore[method-assign,assignment]
    watermarks = SharedWatermarks(ledger, wait_s=PATIENCE_S)  # type: ignore[arg-type]
    stack.push_async_callback(watermarks.aclose)
    before = asyncio.create_task(watermarks.read(BOOKS, Deadline.after(PATIENCE_S)))
    await begun.wait()
    ledger.seq += 1
    after = asyncio.create_task(watermarks.read(BOOKS, Deadline.after(PATIENCE_S)))
    await asyncio.sleep(0)
    gate.set()
    assert (await before, await after) == (SEQ, SEQ + 1)


async def test_a_late_read_is_waited_for_by_few(stack: AsyncExitStack) -> None:
    """While a read is late others do not wait at all; once it has ended they do again."""
    ledger = MemoryLedger()
    gate, state = asyncio.Event(), ledger.state

    async def slow(uuid: str) -> object:
        await gate.wait()
        return await state(uuid)

    ledger.state = slow  # type: ignore[method-assign,assignment]
    watermarks = SharedWatermarks(ledger, wait_s=0.02)  # type: ignore[arg-type]
    stack.push_async_callback(watermarks.aclose)
    assert await watermarks.read(BOOKS, Deadline.after(PATIENCE_S)) is None
    waiting = asyncio.create_task(watermarks.read(BOOKS, Deadline.after(PATIENCE_S)))
    await asyncio.sleep(0)
    assert waiting.done()
    assert await waiting is None
    gate.set()
    async with asyncio.timeout(PATIENCE_S):
        while await watermarks.read(BOOKS, Deadline.after(PATIENCE_S)) != SEQ:
            await asyncio.sleep(0.001)
