"""HTTP to a peer, against real servers that misbehave."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable
from services.common.transport import Transport
from tests.peer_server import Answer, Peer, closes, floods, hangs, raw, resets, says


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A peer that answers `ok`."""
    async with Peer([says(200, b"ok")]) as peer:
        yield peer


@pytest.fixture
async def transport(peer: Peer) -> AsyncIterator[Transport]:
    """A transport to the peer that takes at most a million bytes."""
    transport = Transport("peer", peer.url + "/", max_reply_bytes=1_000_000)
    yield transport
    await transport.aclose()


async def send(transport: Transport, deadline: Deadline | None = None, **options) -> bytes:
    """Return the body of the answer to a request."""
    return (await transport.send("POST", "/x", deadline or Deadline.after(5), content=b"?", **options)).body


async def test_every_status_is_a_reply(peer: Peer, transport: Transport) -> None:
    """Redirects are not followed, errors not raised: what a status means is the caller's to say."""
    for status in (200, 302, 404, 500):
        peer.answers = [says(status, b"body", {"location": "/elsewhere", "X-More": "1"})]
        reply = await transport.send("GET", "/x", NO_DEADLINE)
        assert (reply.status, reply.body, reply.headers["x-more"]) == (status, b"body", "1")
    assert [request.path for request in peer.requests] == ["/x"] * 4
    assert "content-type" not in peer.requests[0].headers


async def test_no_proxy_is_asked(peer: Peer, transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of proxies is for calls to the world, not for those between services."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert await send(transport) == b"ok"


@pytest.mark.parametrize(
    "rogue",
    [
        floods,
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 104857600\r\n\r\n" + b" " * 1000),
        raw(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 1_000_001),
    ],
    ids=["no end", "announced", "no length"],
)
async def test_a_reply_over_the_bound_is_cut(peer: Peer, transport: Transport, rogue: Answer) -> None:
    """It is not read to its end; one that announces its size is not read at all."""
    peer.answers = [rogue]
    with pytest.raises(DependencyUnavailable, match="over 1,000,000 bytes"):
        await send(transport)
    peer.answers = [says(200, b"x" * 1_000_000)]
    assert len(await send(transport)) == 1_000_000


@pytest.mark.parametrize(
    "garbage",
    [
        raw(b"\x00\xff\xfe nonsense\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ntoo short"),
        raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 100_000 + b"\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"),
        raw(b""),
        closes,
        resets,
    ],
)
async def test_what_is_no_reply_is_unavailable(peer: Peer, transport: Transport, garbage: Answer) -> None:
    """Garbage, half a reply and a cut connection; the next call goes by a new connection."""
    peer.answers = [garbage]
    with pytest.raises(DependencyUnavailable, match="peer cannot be reached"):
        await send(transport)
    peer.answers = [says(200, b"ok")]
    assert await send(transport) == b"ok"


async def test_a_connection_closed_while_idle_is_repeated_once(peer: Peer, transport: Transport) -> None:
    """At once, on a new connection; not for a call that must not be made twice, nor where the new one is cut too."""
    await send(transport)
    peer.answers = [closes, says(200, b"again")]
    assert await send(transport) == b"again"
    peer.answers = [closes, says(200, b"again")]
    with pytest.raises(DependencyUnavailable):
        await send(transport, repeatable=False)
    await send(transport)
    peer.answers = [closes]
    made = len(peer.requests)
    with pytest.raises(DependencyUnavailable):
        await send(transport)
    assert len(peer.requests) == made + 2


async def test_a_peer_that_restarted_is_used(peer: Peer, transport: Transport) -> None:
    """Connections to the one before are forgotten."""
    await asyncio.gather(*(send(transport) for _ in range(5)))
    await peer.stop()
    await peer.start()
    assert await asyncio.gather(*(send(transport) for _ in range(5))) == [b"ok"] * 5


async def test_what_was_left_is_not_reused(peer: Peer, transport: Transport) -> None:
    """After a call that was cancelled or late its connection is closed: the next answer is not the last one's."""
    peer.answers = [hangs]
    with pytest.raises(DeadlineExceeded):
        await send(transport, Deadline.after(0.02))
    peer.answers = [says(200, b"mine")]
    assert await send(transport) == b"mine"
    assert [request.connection for request in peer.requests] == [1, 2]


async def test_a_hasty_call_puts_no_address_aside(peer: Peer, transport: Transport) -> None:
    """Late after little time says nothing; late after a fair time does, and an answer makes it well again."""
    peer.answers = [hangs]
    with pytest.raises(DeadlineExceeded):
        await send(transport, Deadline.after(0.01))
    assert [endpoint.failures for endpoint in transport.endpoints] == [0]
    with pytest.raises(DeadlineExceeded):
        await send(transport, Deadline.after(0.26))
    assert [endpoint.failures for endpoint in transport.endpoints] == [1]
    peer.answers = [says(200, b"ok")]
    await send(transport)
    assert [(endpoint.failures, endpoint.in_flight) for endpoint in transport.endpoints] == [(0, 0)]
