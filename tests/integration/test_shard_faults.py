"""A router over two replicas of real shards behind real sockets, one of them by way of a proxy that hurts what passes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from services.common.breaker import Breaker
from services.common.retry_budget import RetryBudget
from services.search.ports import RetrievalQuery
from services.search.shards.calling import AskingOptions
from services.search.shards.lexical import question_terms
from services.search.shards.remote import RemoteHost
from services.search.shards.replicas import Replica
from services.search.shards.router import ShardRouter
from tests.fault_proxy import FaultProxy, Mode
from tests.integration.test_shard_nodes import NOTES, applied, opened, served, unit, write
from tests.shard_hosts import soon

WORDS = RetrievalQuery(20, unit(3), "apples number3", explain=True)


@dataclass
class Placed:
    """All shards are on all hosts."""

    hosts: Sequence[Replica]
    fallback: Replica | None = None

    def replicas(self, shard: int) -> Sequence[Replica]:
        return self.hosts

    def everyone(self) -> Sequence[Replica]:
        return self.hosts


@dataclass
class Stack:
    """The proxy, the replica behind it, and routers over it alone and over it and a good one."""

    proxy: FaultProxy
    hurt: Replica
    alone: ShardRouter
    both: ShardRouter


@pytest.fixture
async def stack(tmp_path) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as closing:
        ledger, host = await closing.enter_async_context(opened(tmp_path))
        url = await closing.enter_async_context(served(host))
        await applied(host, await write(ledger, range(40)))
        proxy = closing.enter_context(FaultProxy(urlsplit(url).port or 0))
        bad, good = RemoteHost("bad", proxy.url, api_key="secret"), RemoteHost("good", url, api_key="secret")
        closing.push_async_callback(bad.aclose)
        closing.push_async_callback(good.aclose)
        hurt, well = Replica(bad), Replica(good, in_flight=50)
        options = AskingOptions(
            make_breaker=lambda name: Breaker(name, window_s=1.0, reset_s=0.2),
            budget=RetryBudget(burst=50),
            slow_call_s=1.0,
        )
        alone = ShardRouter(Placed([hurt]), question_terms, options)
        both = ShardRouter(Placed([hurt, well]), question_terms, options)
        closing.push_async_callback(alone.aclose)
        closing.push_async_callback(both.aclose)
        for _ in range(3):
            assert (await both.retrieve(NOTES, WORDS, soon())).ok == 2
        yield Stack(proxy, hurt, alone, both)


@pytest.mark.parametrize("mode", ["refuse", "freeze", "slow", "garbage", "raw", "reset", "huge", "drip"])
async def test_a_replica_that_misbehaves_changes_no_answer(stack, mode: Mode) -> None:
    """Whatever it does, the other answers in its place, the whole of it; and once it is well it is asked again."""
    before = await stack.both.retrieve(NOTES, WORDS, soon())
    stack.proxy.behave(mode)
    for _ in range(5):
        found = await stack.both.retrieve(NOTES, WORDS, soon(10))
        assert (found.ok, found.failures, found.timed_out) == (2, {}, 0)
        assert {call.host for call in found.calls.values()} == {"good"}
        assert sorted(found.candidates, key=str) == sorted(before.candidates, key=str)
    stack.proxy.behave("pass")
    async with asyncio.timeout(20):
        while "bad" not in {call.host for call in (await stack.both.retrieve(NOTES, WORDS, soon())).calls.values()}:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("mode", ["refuse", "garbage", "raw", "reset", "huge"])
async def test_without_another_the_answer_says_what_failed_and_soon_nobody_is_asked(stack, mode: Mode) -> None:
    """First the host's failure for each shard, then that calls are paused; and all is well soon after it is."""
    stack.proxy.behave(mode)
    found = await stack.alone.retrieve(NOTES, WORDS, soon(10))
    assert (found.ok, found.failures.keys(), found.timed_out) == (0, {0, 1}, 0)
    async with asyncio.timeout(20):
        while (await stack.alone.retrieve(NOTES, WORDS, soon(10))).breaker_open < 2:
            pass
    stack.proxy.behave("pass")
    async with asyncio.timeout(20):
        while (await stack.alone.retrieve(NOTES, WORDS, soon(10))).ok < 2:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("mode", ["freeze", "drip"])
async def test_without_another_one_that_hangs_is_late_until_its_breaker_opens(stack, mode: Mode) -> None:
    """A search is back by its deadline; soon it does not wait at all."""
    stack.proxy.behave(mode)
    found = await stack.alone.retrieve(NOTES, WORDS, soon(0.8))
    assert (found.ok, found.timed_out) == (0, 2)
    async with asyncio.timeout(20):
        while (await stack.alone.retrieve(NOTES, WORDS, soon(0.8))).breaker_open < 2:
            pass
    stack.proxy.behave("pass")
    async with asyncio.timeout(20):
        while (await stack.alone.retrieve(NOTES, WORDS, soon(10))).ok < 2:
            await asyncio.sleep(0.05)
