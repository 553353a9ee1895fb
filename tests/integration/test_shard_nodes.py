"""Hosts with real shards that follow a real SQLite ledger, in this process and behind a socket; restarts and damage."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from services.common.app import create_service_app
from services.common.errors import Conflict, DependencyUnavailable, NotReady
from services.search.filters import parse_filter
from services.search.ledger.sqlite import SqliteLedger
from services.search.ports import Collection, LedgerDocument, RetrievalQuery, ShardHost, ShardQuery
from services.search.settings import SearchSettings
from services.search.shards.directory import ShardDirectory
from services.search.shards.host import HostOptions, LocalHost
from services.search.shards.lexical import question_terms
from services.search.shards.remote import RemoteHost
from services.search.shards.replicas import OneHost, Replica
from services.search.shards.router import ShardRouter
from services.search.shards.serving import NodeResources, node_routes
from services.search.shards.vectors import VectorOptions
from tests.shard_hosts import FakeHost, eventually, soon

DIM = 8
NOTES = Collection("uuid-notes", "notes", None, "fp", DIM, 2, 0.0)


def unit(number: int) -> np.ndarray:
    vector = np.zeros(DIM, np.float32)
    vector[number % DIM] = 1
    return vector


def document(number: int, text: str | None = None, **metadata) -> LedgerDocument:
    text = text or f"note number{number} about apples"
    return LedgerDocument(f"n{number}", text, None, {"parity": number % 2, **metadata}, unit(number), b"c", b"e")


class CountingLedger(SqliteLedger):
    """Remembers from where its log was read."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.read_after: list[int] = []

    async def operations_after(self, uuid, seq, *, limit):
        self.read_after.append(seq)
        return await super().operations_after(uuid, seq, limit=limit)


@asynccontextmanager
async def opened(place: Path, **options) -> AsyncIterator[tuple[CountingLedger, LocalHost]]:
    """Open the ledger and a host in *place*; close both in order."""
    async with AsyncExitStack() as stack:
        ledger = await CountingLedger.open(place / "ledger.db")
        stack.push_async_callback(ledger.aclose)
        directory = ShardDirectory(place / "shards", VectorOptions(), readers=2, writers=1, maintenance_share=1.0)
        stack.push_async_callback(asyncio.to_thread, directory.close)
        host = LocalHost("local", ledger, directory, HostOptions(poll_s=0.05, **options))
        stack.push_async_callback(host.aclose)
        if not await ledger.list_collections():
            await ledger.create_collection(NOTES)
        await host.start()
        yield ledger, host


@asynccontextmanager
async def served(host: LocalHost) -> AsyncIterator[str]:
    """Serve *host* as a node on a free port, with an API key; yield its URL."""

    @asynccontextmanager
    async def build(_settings, _metrics) -> AsyncIterator[NodeResources]:
        yield NodeResources(host)

    settings = SearchSettings(api_key="secret")
    app = create_service_app(
        "search", settings, build, [node_routes()], description="", needs=lambda _method, _path: "search"
    )
    listening = socket.create_server(("127.0.0.1", 0))
    # asyncio does so only for sockets that it makes itself; without, each answer waits 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    serving = asyncio.create_task(server._serve([listening]))
    await eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    await serving


@pytest.fixture
async def local(tmp_path) -> AsyncIterator[tuple[CountingLedger, LocalHost]]:
    async with opened(tmp_path) as found:
        yield found


@pytest.fixture(params=["in this process", "behind a socket"])
async def host(local, request) -> AsyncIterator[ShardHost]:
    """The same host, here and as a router sees it from another process."""
    if request.param == "in this process":
        yield local[1]
        return
    async with served(local[1]) as url:
        remote = RemoteHost("node", url, api_key="secret")
        yield remote
        await remote.aclose()


async def write(ledger: SqliteLedger, numbers, **metadata) -> int:
    return (await ledger.append(NOTES.uuid, [document(number, **metadata) for number in numbers])).seq


async def applied(host: ShardHost, seq: int) -> None:
    for shard in range(NOTES.shards):
        assert await host.wait_applied(NOTES, shard, seq, soon(20))


async def search(host: ShardHost, query: ShardQuery) -> dict[str, float | None]:
    answers = [await host.search(NOTES, shard, query, soon()) for shard in range(NOTES.shards)]
    return {candidate.id: candidate.dense for answer in answers for candidate in answer.candidates}


def lexical(text: str, **fields) -> ShardQuery:
    return ShardQuery(100, terms=question_terms(text, "english", stop_words=True), **fields)


# --- the port, here and behind a socket


async def test_what_is_in_the_ledger_is_found(local, host) -> None:
    """By words, by vector and by filter; with statistics, stored fields and matches."""
    seq = await write(local[0], range(40))
    await applied(host, seq)
    assert set(await search(host, lexical("number7"))) == {"n7"}
    found = await search(host, ShardQuery(100, vector=unit(3), filter=parse_filter({"parity": 1})))
    assert {id_ for id_, score in found.items() if score == pytest.approx(1)} == {"n3", "n11", "n19", "n27", "n35"}
    assert len(found) == 20
    statistics = [await host.statistics(NOTES, shard, lexical("apples").terms, soon()) for shard in (0, 1)]
    assert sum(statistics[1:], statistics[0]).documents == 40
    documents = {}
    for shard in (0, 1):
        documents |= await host.fetch(NOTES, shard, ["n1", "n2", "gone"], soon(), vectors=True)
    assert documents["n2"].text == "note number2 about apples"
    assert documents["n2"].metadata == {"parity": 0}
    assert documents["n2"].vector.tolist() == unit(2).tolist()
    matches = [await host.matching(NOTES, shard, parse_filter({"parity": 0}), soon(), limit=99) for shard in (0, 1)]
    assert len({match.id for found in matches for match in found}) == 20


async def test_explanations_and_facets_travel(local, host) -> None:
    """The plan and the counts of values are the shard's own."""
    await applied(host, await write(local[0], range(20), kind="fruit"))
    query = lexical("apples", explain=True, facets={"kind": 5}, filter=parse_filter({"parity": 0}))
    answers = [await host.search(NOTES, shard, query, soon()) for shard in (0, 1)]
    assert sum(answer.facets["kind"]["fruit"] for answer in answers) == 10
    assert all(answer.plan and answer.plan["filter"]["matched"] == len(answer.candidates) for answer in answers)


async def test_orders_are_followed(local, host) -> None:
    """Standings, snapshots, audits."""
    seq = await write(local[0], range(20))
    await applied(host, seq)
    assert [await host.snapshot(NOTES, shard, soon()) for shard in (0, 1)] == [seq, seq]
    standings = await host.standings(NOTES, soon())
    assert [(standing.shard, standing.applied_seq, standing.snapshot_seq) for standing in standings] == [
        (0, seq, seq),
        (1, seq, seq),
    ]
    assert sum(standing.documents for standing in standings) == 20
    reports = [await host.audit(NOTES, shard, soon(20), repair=False) for shard in (0, 1)]
    assert [dict(report.differences) for report in reports] == [{}, {}]
    assert not await host.wait_applied(NOTES, 0, seq + 1, soon(0.1))


async def test_a_shard_of_another_node_is_not_ready(local, host) -> None:
    """The message says which shards this one has."""
    with pytest.raises(NotReady, match=r"Shard 7 .* it has 0, 1"):
        await host.search(NOTES, 7, ShardQuery(1), soon())


async def test_a_deleted_collection_leaves_nothing(local, host, tmp_path) -> None:
    """`forget` is for what the ledger has no more; files and all go."""
    await applied(host, await write(local[0], range(20)))
    await local[0].delete_collection(NOTES.uuid)
    await host.forget(NOTES)
    assert not (tmp_path / "shards" / NOTES.uuid).exists()


async def test_the_router_over_it(local, host) -> None:
    """Both steps of a hybrid retrieval, and fetching what was found."""
    router = ShardRouter(OneHost(Replica(host)), question_terms)
    await applied(host, await write(local[0], range(40)))
    found = await router.retrieve(NOTES, RetrievalQuery(5, unit(3), "number3 apples"), soon())
    assert (found.total, found.ok, found.failures, found.as_of) == (2, 2, {}, 40)
    best = max(found.candidates, key=lambda candidate: (candidate.dense, candidate.bm25 or 0))
    assert best.id == "n3"
    documents = (await router.fetch(NOTES, found.candidates, soon())).documents
    assert documents.keys() == {candidate.id for candidate in found.candidates}
    await router.aclose()


async def test_the_compressed_copy_answers_in_a_dead_nodes_place(local, tmp_path) -> None:
    """It follows the same ledger in a directory of its own; what it answers is flagged, and its fields are whole."""
    ledger = local[0]
    directory = ShardDirectory(
        tmp_path / "fallback", VectorOptions(compact=True), readers=1, writers=1, maintenance_share=1.0
    )
    copy = LocalHost("fallback", ledger, directory, HostOptions(poll_s=0.05))
    await copy.start()
    dead = FakeHost("dead", error=DependencyUnavailable("the node cannot be reached"))
    router = ShardRouter(OneHost(Replica(dead), Replica(copy, local=True)), question_terms)
    await applied(copy, await write(ledger, range(40)))
    found = await router.retrieve(NOTES, RetrievalQuery(8, unit(3), "number3 apples"), soon())
    assert (found.ok, found.fallback, found.failures) == (2, 2, {})
    best = max(found.candidates, key=lambda candidate: (round(candidate.dense, 1), candidate.bm25 or 0))
    assert best.id == "n3"
    assert (await router.fetch(NOTES, found.candidates, soon())).documents["n3"].text == "note number3 about apples"
    await router.aclose()
    await copy.aclose()
    await asyncio.to_thread(directory.close)


# --- restarts and trouble


async def test_a_restart_reads_only_what_is_new(tmp_path) -> None:
    """Shards come from their snapshots; updates and deletions since are applied to them."""
    async with opened(tmp_path) as (ledger, host):
        await applied(host, await write(ledger, range(100)))
    async with opened(tmp_path) as (ledger, host):
        assert ledger.read_after == []
        assert len(await search(host, lexical("apples"))) == 100
        await ledger.append(NOTES.uuid, [document(1, "pears now")])
        seq = (await ledger.delete(NOTES.uuid, ["n2"])).seq
        host.notify(NOTES, seq)
        await applied(host, seq)
        assert set(ledger.read_after) == {100}
        assert len(await search(host, lexical("apples"))) == 98
        assert set(await search(host, lexical("pears"))) == {"n1"}


async def test_what_was_written_while_it_was_away_is_applied_at_the_start(tmp_path) -> None:
    """Nobody has to ask for it; and nothing from before is read again."""
    async with opened(tmp_path) as (ledger, host):
        await applied(host, await write(ledger, range(50)))
    ledger = await SqliteLedger.open(tmp_path / "ledger.db")
    seq = await write(ledger, range(50, 60))
    await ledger.aclose()
    async with opened(tmp_path) as (ledger, host):
        await eventually(lambda: [s.applied_seq for s in host.open_standings()] == [seq, seq])
        assert set(ledger.read_after) == {50}
        assert len(await search(host, lexical("apples"))) == 60


async def test_damaged_snapshots_are_rebuilt_from_the_ledger(tmp_path) -> None:
    """With every snapshot's manifest cut off the shards begin again, say so until they are there, and are whole then."""
    async with opened(tmp_path) as (ledger, host):
        await applied(host, await write(ledger, range(100)))
    manifests = list((tmp_path / "shards").rglob("manifest.json"))
    assert manifests
    for manifest in manifests:
        manifest.write_bytes(manifest.read_bytes()[:-20])
    async with opened(tmp_path) as (ledger, host):
        first = await host.search(NOTES, 0, lexical("apples"), soon())
        assert first.catching_up or first.applied_seq == 100
        await applied(host, 100)
        assert len(await search(host, lexical("apples"))) == 100
        assert 0 in ledger.read_after
        assert not (await host.search(NOTES, 0, lexical("apples"), soon())).catching_up


async def test_a_ledger_restored_to_an_earlier_point_is_noticed(tmp_path) -> None:
    """The shards' snapshots are of operations that the ledger lost: nothing of them is mixed with what came after."""
    async with opened(tmp_path) as (ledger, host):
        await applied(host, await write(ledger, range(50)))
    backup = (tmp_path / "ledger.db").read_bytes()
    async with opened(tmp_path) as (ledger, host):
        await applied(host, await write(ledger, range(50, 80)))
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "ledger.db").write_bytes(backup)
    ledger = await SqliteLedger.open(tmp_path / "ledger.db")
    seq = (await ledger.append(NOTES.uuid, [document(number, f"pears {number}") for number in range(100, 150)])).seq
    await ledger.aclose()
    async with opened(tmp_path) as (ledger, host):
        await applied(host, seq)
        await eventually(lambda: not any(standing.catching_up for standing in host.open_standings()))
        assert len(await search(host, lexical("apples"))) == 50
        assert len(await search(host, lexical("pears"))) == 50


async def test_a_trimmed_log_makes_an_old_snapshot_useless(tmp_path) -> None:
    """Deletions that were forgotten while the follower was away do not come back to life."""
    async with opened(tmp_path) as (ledger, host):
        await applied(host, await write(ledger, range(50)))
    ledger = await SqliteLedger.open(tmp_path / "ledger.db")
    seq = (await ledger.delete(NOTES.uuid, [f"n{number}" for number in range(10)])).seq
    await ledger.trim(NOTES.uuid, seq)
    await ledger.aclose()
    async with opened(tmp_path) as (ledger, host):
        await eventually(lambda: [s.applied_seq for s in host.open_standings()] == [seq, seq])
        assert len(await search(host, lexical("apples"))) == 40


async def test_idle_collections_are_closed_and_opened_again(tmp_path) -> None:
    """Their files are given up; the next search has the same answers, without reading the log again."""
    async with opened(tmp_path, idle_close_s=0.2) as (ledger, host):
        await applied(host, await write(ledger, range(50)))
        await eventually(lambda: not host.open_standings())
        ledger.read_after.clear()
        assert len(await search(host, lexical("apples"))) == 50
        assert ledger.read_after == []


async def test_a_second_process_is_refused(tmp_path) -> None:
    """Two on one directory would write the same files; the message names the holder."""
    async with opened(tmp_path):
        with pytest.raises(Conflict, match=r"in use by process \d+"):
            ShardDirectory(tmp_path / "shards", VectorOptions(), readers=1, writers=1, maintenance_share=1.0)
