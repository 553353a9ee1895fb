"""Calls to a peer service: retries, deadlines, verdicts and the breaker, against peers that are functions."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import orjson
import pytest
import structlog
from pydantic import BaseModel

from services.common.breaker import Breaker
from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import (
    Conflict,
    DeadlineExceeded,
    DependencyUnavailable,
    InvalidInput,
    NotFound,
    Overloaded,
    TooLarge,
)
from services.common.http_client import ServiceClient

Answer = httpx2.Response | Exception


class Question(BaseModel):
    """What the tests send."""

    text: str
    note: str | None = None


class Reply(BaseModel):
    """What the peers answer with."""

    value: int


class Peer:
    """Answers with the next of *answers*, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def good(value: int = 7) -> httpx2.Response:
    """Return a good answer."""
    return httpx2.Response(200, json={"value": value})


def refusal(status: int, message: str = "no", param: str | None = None) -> httpx2.Response:
    """Return an error in the envelope."""
    error = {"code": "x", "message": message, "type": "y", "param": param}
    return httpx2.Response(status, json={"error": error})


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., ServiceClient]]:
    """Return clients of a peer; they are closed at the end."""
    clients: list[ServiceClient] = []

    def connect(peer: Callable[[httpx2.Request], Awaitable[httpx2.Response]], **breaker_options) -> ServiceClient:
        breaker = Breaker("peer", **{"min_calls": 3, "reset_s": 60.0, **breaker_options})
        clients.append(ServiceClient("peer", "http://peer", breaker, transport=httpx2.MockTransport(peer)))
        return clients[-1]

    yield connect
    for client in clients:
        await client.aclose()


async def ask(client: ServiceClient, **changes) -> Reply:
    """Ask the peer one question."""
    options = {"body": Question(text="why?"), "deadline": Deadline.after(30), **changes}
    return await client.call("POST", "/answer", Reply, **options)


async def test_an_answer_is_parsed(connect):
    """The body goes out as JSON without its nulls, and the answer comes back as the model asked for."""
    peer = Peer(good())
    assert await ask(connect(peer)) == Reply(value=7)
    (request,) = peer.requests
    assert (request.method, request.url) == ("POST", "http://peer/answer")
    assert request.headers["content-type"] == "application/json"
    assert orjson.loads(request.content) == {"text": "why?"}


@pytest.mark.parametrize(
    "trouble",
    [refusal(503), httpx2.Response(502, text="<html>"), httpx2.ConnectError("refused"), httpx2.ReadError("cut")],
    ids=["503", "502", "refused", "cut"],
)
async def test_trouble_is_retried_once(connect, trouble):
    """An idempotent call that fails is made once more, and no more than that."""
    peer = Peer(trouble, good())
    assert await ask(connect(peer)) == Reply(value=7)
    assert len(peer.requests) == 2
    peer = Peer(trouble)
    with pytest.raises(DependencyUnavailable, match="peer"):
        await ask(connect(peer))
    assert len(peer.requests) == 2


async def test_other_calls_are_never_retried(connect):
    """A call that is not idempotent is made once, whatever becomes of it."""
    peer = Peer(refusal(503), good())
    with pytest.raises(DependencyUnavailable):
        await ask(connect(peer), idempotent=False)
    assert len(peer.requests) == 1


async def test_nothing_is_retried_when_there_is_no_time_for_it(connect):
    """With less time left than a retry takes the first failure is final; after the deadline no call is made at all."""
    peer = Peer(refusal(503), good())
    with pytest.raises(DependencyUnavailable):
        await ask(connect(peer), deadline=Deadline.after(0.04))
    assert len(peer.requests) == 1
    with pytest.raises(DeadlineExceeded):
        await ask(connect(peer), deadline=Deadline.after(-1))
    assert len(peer.requests) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidInput),
        (404, NotFound),
        (409, Conflict),
        (413, TooLarge),
        (422, InvalidInput),
        (429, Overloaded),
    ],
)
async def test_the_peers_verdict_is_passed_on(connect, status, error):
    """What the peer says of the request reaches the caller with its field, unretried, and is no fault of the peer's."""
    peer = Peer(refusal(status, "not like this", "text"))
    client = connect(peer)
    for _ in range(5):
        with pytest.raises(error, match="peer: not like this") as caught:
            await ask(client)
        assert caught.value.param == "text"
    assert len(peer.requests) == 5
    assert client.breaker.state == "closed"


async def test_a_limited_caller_hears_when_to_come_again(connect):
    """The peer's Retry-After is passed on."""
    answer = refusal(429)
    answer.headers["retry-after"] = "7"
    with pytest.raises(Overloaded) as caught:
        await ask(connect(Peer(answer)))
    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_the_peer_refuses_is_our_trouble(connect, status):
    """Our caller cannot mend it: to them the peer is not available, and the message says why."""
    with pytest.raises(DependencyUnavailable, match="not known"):
        await ask(connect(Peer(refusal(status, "not known"))))


async def test_the_key_is_sent():
    """As a bearer token, if there is one."""
    peer = Peer(good())
    for key in ("secret", None):
        client = ServiceClient(
            "peer", "http://peer", Breaker("peer"), api_key=key, transport=httpx2.MockTransport(peer)
        )
        await ask(client)
        await client.aclose()
    assert [request.headers.get("authorization") for request in peer.requests] == ["Bearer secret", None]


async def test_a_verdict_without_envelope_still_is_one(connect):
    """A proxy's bare 413 is TooLarge all the same."""
    with pytest.raises(TooLarge, match="HTTP 413"):
        await ask(connect(Peer(httpx2.Response(413, text="<html>"))))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[1]", b'{"value": "many"}', b'{"value": NaN}', b"\xff\xfe", b'{"other": 1}']
)
async def test_an_answer_that_cannot_be_read_is_the_peers_failure(connect, body):
    """Garbage with status 200 is DependencyUnavailable and counts against the peer."""
    client = connect(Peer(httpx2.Response(200, content=body)), min_calls=2)
    with pytest.raises(DependencyUnavailable, match="cannot be read"):
        await ask(client)
    assert client.breaker.state == "open"


async def test_the_deadline_and_the_request_id_travel(connect):
    """The peer is told how many milliseconds are left, and the id of the request it works for."""
    peer = Peer(good())
    with structlog.contextvars.bound_contextvars(request_id="abc-1"):
        await ask(connect(peer), deadline=Deadline.after(2.0))
    headers = peer.requests[0].headers
    assert headers["x-request-id"] == "abc-1"
    assert 1000 < int(headers["x-deadline-ms"]) <= 2000


async def test_without_deadline_and_request_id_no_header_is_sent(connect):
    """A call that may take for ever, made for no request, says nothing of either."""
    peer = Peer(good())
    await ask(connect(peer), deadline=NO_DEADLINE)
    assert not {"x-deadline-ms", "x-request-id"} & set(peer.requests[0].headers)


async def test_the_peer_may_be_told_to_answer_earlier(connect):
    """With answer_by the peer hears of less time than the caller waits."""
    peer = Peer(good())
    deadline = Deadline.after(20.0)
    await ask(connect(peer), deadline=deadline, answer_by=deadline.earlier(15.0))
    assert int(peer.requests[0].headers["x-deadline-ms"]) <= 5000


async def test_a_slow_peer_is_left_at_the_deadline(connect):
    """A peer that does not answer in time is DeadlineExceeded, its call cancelled, and it is not asked again."""
    cancelled = []

    async def slow(request: httpx2.Request) -> httpx2.Response:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        return good()

    with pytest.raises(DeadlineExceeded, match="did not answer in time"):
        await ask(connect(slow), deadline=Deadline.after(0.03))
    assert len(cancelled) == 1


async def test_a_peer_that_drips_is_left_at_the_deadline(connect):
    """The deadline holds for the whole answer, not for each byte of it."""

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.001)

    async def dripping(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=drip())

    with pytest.raises(DeadlineExceeded):
        await ask(connect(dripping), deadline=Deadline.after(0.03))


async def test_the_peers_own_time_out_is_deadline_exceeded(connect):
    """A 504 of the peer means that the time ran out there, and is not retried."""
    peer = Peer(refusal(504))
    with pytest.raises(DeadlineExceeded):
        await ask(connect(peer))
    assert len(peer.requests) == 1


async def test_an_open_breaker_refuses_without_a_call(connect):
    """A peer that keeps failing is left alone: the call that opens the breaker is the last one made."""
    peer = Peer(refusal(500))
    client = connect(peer)
    for _ in range(2):
        with pytest.raises(DependencyUnavailable):
            await ask(client)
    assert client.breaker.state == "open"
    calls = len(peer.requests)
    assert calls == 3
    with pytest.raises(DependencyUnavailable, match="paused"):
        await ask(client)
    assert len(peer.requests) == calls


async def test_after_the_pause_the_peer_is_tried_again(connect):
    """Once the pause is over a call that goes well closes the breaker."""
    peer = Peer(refusal(500))
    client = connect(peer, reset_s=0.0)
    for _ in range(2):
        with pytest.raises(DependencyUnavailable):
            await ask(client)
    peer.answers = [good()]
    assert await ask(client) == Reply(value=7)
    assert client.breaker.state == "closed"


async def test_a_cancelled_call_is_no_failure(connect):
    """Callers that go away do not open the breaker for the others."""
    asked = asyncio.Event()

    async def silent(_request: httpx2.Request) -> httpx2.Response:
        asked.set()
        await asyncio.sleep(60)
        return good()

    client = connect(silent, min_calls=1)
    task = asyncio.create_task(ask(client))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.breaker.state == "closed"


async def test_hasty_callers_do_not_open_the_breaker():
    """A call that was given too little time is late, and says nothing against the peer."""

    async def slow(_request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0.2)
        return httpx2.Response(200, json={"value": 1})

    breaker = Breaker("peer", min_calls=3)
    client = ServiceClient("peer", "http://peer", breaker, transport=httpx2.MockTransport(slow))
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            await client.call("GET", "/", Reply, deadline=Deadline.after(0.01))
    assert breaker.state == "closed"
    await client.aclose()


async def test_an_endless_reply_is_cut(monkeypatch: pytest.MonkeyPatch):
    """A reply over the bound is not read to its end."""
    monkeypatch.setattr("services.common.http_client.MAX_REPLY_BYTES", 1000)
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 500
            yield b" " * 500

    async def endless(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body())

    transport = httpx2.MockTransport(endless)
    client = ServiceClient("peer", "http://peer", Breaker("peer"), retries=0, transport=transport)
    with pytest.raises(DependencyUnavailable, match="over"):
        await client.call("GET", "/", Reply, deadline=Deadline.after(5))
    assert sent < 5000
    await client.aclose()
