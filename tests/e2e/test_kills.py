"""Real processes with the fake model, killed while they work: nothing acknowledged is lost, every search is answered."""

import asyncio
from pathlib import Path

import pytest

from tercet.client import TercetClient
from tercet.errors import TercetClientError
from tests.e2e.stack import DOCUMENTS, kill, running, until

FLAGS = {
    "embedding": {"embedding_unavailable", "embedding_late"},
    "rerank": {"rerank_unavailable", "rerank_late", "rerank_partial"},
}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["embedding", "rerank"])
async def test_every_search_is_answered_while_a_model_service_dies(tmp_path: Path, victim: str):
    """A killed model service costs flags, never an answer; the flags go when it is back."""
    async with running(tmp_path, EMBEDDING_MODEL="fake", RERANK_MODEL="fake") as (stack, client):
        await client.write("facts", DOCUMENTS)
        flags: list[set[str]] = []
        stop = asyncio.Event()

        async def stream(number: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                reply = await client.search(
                    query=f"knead flour water salt yeast dough {number}-{count}", collection="facts", cache=False
                )
                assert reply.hits[0].id == "bread"
                flags.append(set(reply.degraded))
                await asyncio.sleep(0.005)

        streams = [asyncio.create_task(stream(number)) for number in range(4)]
        await asyncio.sleep(0.5)
        before = len(flags)
        kill(stack, victim)

        async def flagged() -> bool:
            return any(flags[before:])

        async def clean_again() -> bool:
            return len(flags) > before + 50 and not any(flags[-20:])

        await until(flagged, within_s=20)
        await until(clean_again, within_s=60)
        stop.set()
        await asyncio.gather(*streams)
        assert not any(flags[:before])
        assert set().union(*flags) <= FLAGS[victim]


@pytest.mark.slow
async def test_search_killed_amid_writes_loses_nothing_acknowledged(tmp_path: Path):
    """After SIGKILL of search between any two instructions, every acknowledged document is found by id and by word."""
    async with running(tmp_path, EMBEDDING_MODEL="fake", RERANK_MODEL="fake") as (stack, client):
        acknowledged: list[str] = []
        for round_ in range(3):
            writers = [
                asyncio.create_task(_write_until_killed(client, f"r{round_}w{w}", acknowledged)) for w in range(4)
            ]
            had = len(acknowledged)
            async with asyncio.timeout(30):
                while len(acknowledged) < had + 40:
                    await asyncio.sleep(0.01)
            kill(stack, "search")
            await asyncio.gather(*writers)
            await until(client.ready, within_s=60)

        async def applied() -> bool:
            state = await client.collection("notes")
            return state.applied_seq == state.seq

        await until(applied, within_s=30)
        assert len(acknowledged) >= 120
        for id_ in acknowledged:
            assert (await client.get_document("notes", id_)).text == f"note named {id_}"
        for id_ in acknowledged[::7]:
            reply = await client.search(query=id_, collection="notes", mode="lexical", rerank=False, k=1)
            assert [hit.id for hit in reply.hits] == [id_]
        assert (await client.collection("notes")).documents >= len(acknowledged)


async def _write_until_killed(client: TercetClient, prefix: str, acknowledged: list[str]) -> None:
    for number in range(10_000):
        id_ = f"{prefix}n{number}"
        try:
            await client.write("notes", [{"id": id_, "text": f"note named {id_}", "metadata": {}}])
        except TercetClientError:
            return
        acknowledged.append(id_)
