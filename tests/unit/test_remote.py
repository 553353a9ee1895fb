"""A shard node as a host: what travels, what its errors mean, and which addresses there are."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from services.common import addresses
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import (
    BackendFailed,
    DeadlineExceeded,
    DependencyUnavailable,
    InvalidInput,
    Malformed,
    NotFound,
    NotReady,
    TercetError,
)
from services.common.http_errors import STATUS
from services.common.wire.errors import ErrorBody, ErrorEnvelope
from services.search.filters import parse_filter
from services.search.ports import (
    AuditReport,
    Candidate,
    Collection,
    LexicalStatistics,
    Match,
    ShardAnswer,
    ShardDocument,
    ShardQuery,
    ShardStanding,
)
from services.search.shards import endpoints, messages
from services.search.shards.endpoints import Nodes
from services.search.shards.remote import RemoteHost
from tests.peer_server import Answer, Peer, closes, hangs, json, raw, resets, says
from tests.shard_hosts import BOOKS, eventually, soon

TYPED = Collection("u", "n", "m", "fp", 3, 2, 1.5, "l2", {"lang": "keyword", "on": "date", "year": "number"}, "german")


def through(value):
    """Return *value* as it arrives."""
    return messages.unpack_request(messages.pack({"it": value}))["it"]


# --- what travels


def test_collections_arrive_as_they_were_sent() -> None:
    """With their attributes, and without."""
    for collection in (BOOKS, TYPED):
        assert messages.collection_in(through(messages.collection_out(collection))) == collection
    with pytest.raises(Malformed):
        messages.collection_in({"uuid": "only"})


def test_queries_arrive_as_they_were_sent() -> None:
    """Every field of them: the vector bit for bit, the filter as an equal expression."""
    vector = np.array([0.1, -2.5, 3e-9], np.float32)
    expression = parse_filter(
        {"lang": "de", "year": {"$gte": 2020}, "$not": {"on": {"$lt": "2024-01-01"}}}, TYPED.attributes
    )
    query = ShardQuery(
        limit=7,
        vector=vector,
        terms=["a", "a", "ü"],
        statistics=LexicalStatistics(9, {"a": 3, "ü": 0}),
        filter=expression,
        match="phrase",
        prefix=True,
        exact=True,
        explain=True,
        facets={"lang": 3},
    )
    arrived = messages.query_in(through(messages.query_out(query)), TYPED)
    assert arrived.vector is not None
    assert arrived.vector.dtype == np.float32
    assert arrived.vector.tobytes() == vector.tobytes()
    assert replace(arrived, vector=None) == replace(query, vector=None)
    assert messages.query_in(through(messages.query_out(ShardQuery(3))), TYPED) == ShardQuery(3, terms=[])


def test_answers_arrive_as_they_were_sent() -> None:
    """Candidates, times, the plan (NumPy's numbers become plain ones), facets and flags."""
    answer = ShardAnswer(
        shard=1,
        applied_seq=9,
        candidates=[Candidate("ä", 1, 5, 0.5, None), Candidate("b", 1, 6, None, 2.25)],
        timings_ms={"dense": 0.25},
        plan={"vectors": {"beam": np.int64(64)}},
        facets={"lang": {"de": 3}},
        catching_up=True,
    )
    arrived = messages.answer_in(through(messages.answer_out(answer)))
    assert arrived == replace(answer, plan={"vectors": {"beam": 64}})
    assert messages.answer_in(through(messages.answer_out(ShardAnswer(0, 0, ())))).candidates == []


def test_the_rest_arrives_as_it_was_sent() -> None:
    """Documents, matches, standings, reports, statistics."""
    document = ShardDocument("a", "text", None, {"n": 1, "tags": ["x"]}, np.ones(3, np.float32), 4)
    found = messages.documents_in(
        through(messages.documents_out({"a": document, "b": ShardDocument("b", "", "t", {})}))
    )
    assert found["a"].vector is not None
    assert found["a"].vector.tolist() == [1.0, 1.0, 1.0]
    assert replace(found["a"], vector=None) == replace(document, vector=None)
    assert found["b"] == ShardDocument("b", "", "t", {})
    assert messages.matches_in(through(messages.matches_out([Match("a", 3)]))) == [Match("a", 3)]
    standing = ShardStanding(1, 9, 5, 7, {"hnsw": 5}, 100, 200, 8, catching_up=True, failure="why")
    assert messages.standings_in(through(messages.standings_out([standing]))) == [standing]
    report = AuditReport(1, 9, 5, {"missing": ["a"]}, 1)
    assert messages.report_in(through(messages.report_out(report))) == report
    statistics = LexicalStatistics(3, {"a": 1})
    assert messages.statistics_in(through(messages.statistics_out(statistics))) == statistics


def test_a_filter_is_checked_where_it_arrives() -> None:
    """A field that the collection does not index is the caller's fault there too."""
    with pytest.raises(InvalidInput):
        messages.filter_in({"unknown": 1}, TYPED)


def test_what_is_no_message_is_malformed() -> None:
    """Bytes of another kind, and a list where a map is due."""
    for content in (b"\xc1", b"", messages.pack([1])):
        with pytest.raises(Malformed):
            messages.unpack_request(content)
    with pytest.raises(DependencyUnavailable, match="node"):
        messages.unpack_answer(b"\xc1", "node")


# --- the node's verdicts


@asynccontextmanager
async def host_that(*answers: Answer) -> AsyncIterator[tuple[RemoteHost, Peer]]:
    """Return a host whose node gives *answers*, and the node."""
    async with Peer(list(answers)) as node:
        host = RemoteHost("node", node.url, api_key="key")
        yield host, node
        await host.aclose()


def refusing(error: TercetError) -> Answer:
    """Answer with *error* as our services do."""
    body = ErrorBody(
        code=error.code, message=error.message, type=error.type, param=error.param, retryable=error.retryable
    )
    return json(ErrorEnvelope(error=body).model_dump(), STATUS[type(error)])


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (InvalidInput("no such field", param="filter.x"), InvalidInput),
        (NotFound("deleted"), NotFound),
        (NotReady("not open"), NotReady),
        (DeadlineExceeded("late"), DeadlineExceeded),
        (BackendFailed("the index is broken"), BackendFailed),
        (DependencyUnavailable("the ledger is away"), DependencyUnavailable),
    ],
)
async def test_a_nodes_error_is_raised_here_with_its_name(said: TercetError, meant: type[TercetError]) -> None:
    """The same kind, with the field at fault."""
    async with host_that(refusing(said)) as (host, _):
        with pytest.raises(meant, match=f"node: {said.message}") as raised:
            await host.statistics(BOOKS, 0, ["a"], soon())
        assert raised.value.param == said.param


async def test_answers_that_are_none_mean_that_the_node_is_not_there() -> None:
    """A proxy's error page, a success that is no MessagePack, and bytes that are no HTTP."""
    for answer in (says(502, b"<html>"), says(200, b"\xc1<html>"), raw(b"\xc1\xc1\xc1")):
        async with host_that(answer) as (host, _):
            with pytest.raises(DependencyUnavailable):
                await host.statistics(BOOKS, 0, ["a"], soon())


async def test_a_node_that_floods_is_cut() -> None:
    """A reply of 100 MB is refused when its head arrives."""
    async with host_that(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 104857600\r\n\r\n")) as (host, _):
        with pytest.raises(DependencyUnavailable, match="over"):
            await host.statistics(BOOKS, 0, ["a"], soon())


async def test_deadline_and_key_travel() -> None:
    """The node is told how long the caller waits, and nothing where it waits for ever."""
    async with host_that(says(200, messages.pack([0, {}]))) as (host, node):
        await host.statistics(BOOKS, 0, [], soon(2.0))
        await host.statistics(BOOKS, 0, [], NO_DEADLINE)
        first, second = (request.headers for request in node.requests)
        assert 0 < int(first["x-deadline-ms"]) <= 2000
        assert "x-deadline-ms" not in second
        assert first["authorization"] == "Bearer key"
        assert first["content-type"] == messages.MEDIA_TYPE
        with pytest.raises(DeadlineExceeded):
            await host.statistics(BOOKS, 0, [], Deadline.after(-1))


async def test_a_node_that_hangs_is_late() -> None:
    """The call ends with its deadline; waiting for an operation is then simply not over."""
    async with host_that(hangs) as (host, _):
        with pytest.raises(DeadlineExceeded):
            await host.statistics(BOOKS, 0, [], soon(0.05))
        assert await host.wait_applied(BOOKS, 0, 5, soon(0.05)) is False


async def test_a_connection_that_the_node_had_closed_is_no_failure() -> None:
    """The call is made again once; a node that cuts it off again is not there."""
    good = says(200, messages.pack([3, {}]))
    async with host_that(good, closes, good, resets, resets) as (host, node):
        for _ in range(2):
            assert (await host.statistics(BOOKS, 0, [], soon())).documents == 3
        with pytest.raises(DependencyUnavailable):
            await host.statistics(BOOKS, 0, [], soon())
        assert len(node.requests) == 5


# --- addresses


async def test_nodes_have_their_shards_and_every_address_is_a_replica(monkeypatch) -> None:
    """Shard s is on node s mod n; names are resolved again, a new address is used and one that is gone is not."""
    monkeypatch.setattr(endpoints, "RESOLVE_EVERY_S", 0.01)
    names = {"a": ("10.0.0.1", "10.0.0.2"), "b": ("10.0.0.3",), "c": ("fd00::1",)}

    async def resolve(host: str, _port: int) -> tuple[str, ...]:
        if not names[host]:
            raise OSError("no such name")
        return names[host]

    monkeypatch.setattr(addresses, "resolve", resolve)
    nodes = Nodes([["http://a:8010"], ["http://b:8010", "http://c:8011"]], api_key=None)

    def found(shard: int) -> list[str]:
        return [replica.host.name for replica in nodes.replicas(shard)]

    assert found(0) == ["http://a:8010"]
    await nodes.start()
    assert found(0) == found(2) == ["http://a:8010 (10.0.0.1)", "http://a:8010 (10.0.0.2)"]
    assert found(1) == ["http://b:8010", "http://c:8011"]
    assert len(nodes.everyone()) == 4
    kept = nodes.replicas(0)[1]
    names["a"] = ("10.0.0.2", "10.0.0.9")
    await eventually(lambda: found(0) == ["http://a:8010 (10.0.0.2)", "http://a:8010 (10.0.0.9)"])
    assert nodes.replicas(0)[0] is kept
    names["a"] = ()
    await asyncio.sleep(0.05)
    assert len(found(0)) == 2
    await nodes.aclose()


async def test_a_name_that_is_not_known_yet_is_found_later(monkeypatch) -> None:
    """Until then calls go to the name itself, and fail as those to a node that is away."""
    monkeypatch.setattr(endpoints, "RESOLVE_EVERY_S", 0.01)
    known = asyncio.Event()

    async def resolve(_host: str, _port: int) -> tuple[str, ...]:
        if not known.is_set():
            raise OSError("no such name")
        return ("127.0.0.1",)

    monkeypatch.setattr(addresses, "resolve", resolve)
    nodes = Nodes([["http://nowhere.invalid:1"]], api_key=None)
    await nodes.start()
    unresolved = nodes.replicas(0)[0]
    with pytest.raises(DependencyUnavailable):
        await unresolved.host.statistics(BOOKS, 0, [], soon())
    known.set()
    await eventually(lambda: nodes.replicas(0)[0] is not unresolved)
    await nodes.aclose()
