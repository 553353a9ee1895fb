"""Calls to a peer service: retries, deadlines, verdicts and the breaker, against real servers that misbehave."""

import asyncio
from collections.abc import AsyncIterator, Callable

import orjson
import pytest
import structlog
from pydantic import BaseModel

from services.common import addresses
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
from services.common.retry_budget import RetryBudget
from tests.peer_server import Answer, Peer, after, closes, drips, hangs, json, resets, says


class Question(BaseModel):
    """What the tests send."""

    text: str
    note: str | None = None


class Reply(BaseModel):
    """What the peers answer with."""

    value: int


def good(value: int = 7) -> Answer:
    """Return a good answer."""
    return json({"value": value})


def refusal(status: int, message: str = "no", param: str | None = None, **headers: str) -> Answer:
    """Return an error in the envelope."""
    error = {"code": "x", "message": message, "type": "y", "param": param}
    return json({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


Connect = Callable[..., ServiceClient]


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """A peer that answers well."""
    async with Peer([good()]) as peer:
        yield peer


@pytest.fixture
async def connect(peer: Peer) -> AsyncIterator[Connect]:
    """Return clients of the peer, which is told its answers; they are closed at the end."""
    clients: list[ServiceClient] = []

    def connect(*answers: Answer, breaker: dict | None = None, url: str | None = None, **options) -> ServiceClient:
        if answers:
            peer.answers = list(answers)
        guard = Breaker("peer", **{"min_calls": 3, "reset_s": 60.0, **(breaker or {})})
        clients.append(ServiceClient("peer", url or peer.url, guard, **options))
        return clients[-1]

    yield connect
    for client in clients:
        await client.aclose()


async def ask(client: ServiceClient, **changes) -> Reply:
    """Ask the peer one question."""
    options = {"body": Question(text="why?"), "deadline": Deadline.after(30), **changes}
    return await client.call("POST", "/answer", Reply, **options)


async def test_an_answer_is_parsed(peer: Peer, connect: Connect) -> None:
    """The body goes out as JSON without its nulls, and the answer comes back as the model asked for."""
    assert await ask(connect()) == Reply(value=7)
    (request,) = peer.requests
    assert (request.method, request.path) == ("POST", "/answer")
    assert request.headers["content-type"] == "application/json"
    assert orjson.loads(request.content) == {"text": "why?"}


async def test_a_connection_serves_many_calls(peer: Peer, connect: Connect) -> None:
    """Calls after each other go by one connection."""
    client = connect()
    for _ in range(5):
        await ask(client)
    assert peer.connections == 1


@pytest.mark.parametrize(
    "trouble", [refusal(503), says(502, b"<html>"), closes, resets], ids=["503", "502", "closes", "resets"]
)
async def test_trouble_is_retried_once(peer: Peer, connect: Connect, trouble: Answer) -> None:
    """An idempotent call that fails is made once more, and no more than that."""
    assert await ask(connect(trouble, good())) == Reply(value=7)
    assert len(peer.requests) == 2
    with pytest.raises(DependencyUnavailable, match="peer"):
        await ask(connect(trouble))
    assert len(peer.requests) == 4


async def test_a_peer_that_is_not_there_is_unavailable_at_once(peer: Peer, connect: Connect) -> None:
    """A connection that is refused ends the call, which was tried twice; started again, the peer is used."""
    client = connect()
    await peer.stop()
    with pytest.raises(DependencyUnavailable, match="cannot be reached"):
        await ask(client)
    assert client.breaker.status.failures == 2
    await peer.start()
    assert await ask(client) == Reply(value=7)


async def test_other_calls_are_never_retried(peer: Peer, connect: Connect) -> None:
    """A call that is not idempotent is made once, whatever becomes of it."""
    client = connect(good(), closes, good())
    await ask(client)
    with pytest.raises(DependencyUnavailable):
        await ask(client, idempotent=False)
    assert len(peer.requests) == 2


async def test_a_connection_that_was_closed_while_idle_is_no_failure(peer: Peer, connect: Connect) -> None:
    """The call is made again at once on a new one, and the breaker does not hear of it; nor does the budget."""
    budget = RetryBudget(burst=0.0)
    client = connect(good(), closes, good(), budget=budget)
    await ask(client)
    assert await ask(client) == Reply(value=7)
    assert len(peer.requests) == 3
    assert client.breaker.status.failures == 0


async def test_retries_end_with_the_budget(peer: Peer, connect: Connect) -> None:
    """Where everything fails, the calls that are made again are a share of the others."""
    client = connect(refusal(503), breaker={"min_calls": 1000}, budget=RetryBudget(0.1, min_per_s=0.0, burst=2.0))
    for _ in range(20):
        with pytest.raises(DependencyUnavailable):
            await ask(client)
    assert len(peer.requests) == 20 + 2 + 1


async def test_nothing_is_retried_when_there_is_no_time_for_it(peer: Peer, connect: Connect) -> None:
    """With less time left than a retry takes the first failure is final; after the deadline no call is made at all."""
    client = connect(refusal(503), good())
    with pytest.raises(DependencyUnavailable):
        await ask(client, deadline=Deadline.after(0.09))
    assert len(peer.requests) == 1
    with pytest.raises(DeadlineExceeded):
        await ask(client, deadline=Deadline.after(-1))
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
async def test_the_peers_verdict_is_passed_on(
    peer: Peer, connect: Connect, status: int, error: type[Exception]
) -> None:
    """What the peer says of the request reaches the caller with its field, unretried, and is no fault of the peer's."""
    client = connect(refusal(status, "not like this", "text"))
    for _ in range(5):
        with pytest.raises(error, match="peer: not like this") as caught:
            await ask(client)
        assert caught.value.param == "text"  # type: ignore[attr-defined]
    assert len(peer.requests) == 5
    assert client.breaker.state == "closed"


async def test_a_limited_caller_hears_when_to_come_again(connect: Connect) -> None:
    """The peer's Retry-After is passed on."""
    with pytest.raises(Overloaded) as caught:
        await ask(connect(refusal(429, retry_after="7")))
    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_the_peer_refuses_is_our_trouble(connect: Connect, status: int) -> None:
    """Our caller cannot mend it: to them the peer is not available, and the message says why."""
    with pytest.raises(DependencyUnavailable, match="not known"):
        await ask(connect(refusal(status, "not known")))


async def test_the_key_is_sent(peer: Peer, connect: Connect) -> None:
    """As a bearer token, if there is one."""
    for key in ("secret", None):
        await ask(connect(api_key=key))
    assert [request.headers.get("authorization") for request in peer.requests] == ["Bearer secret", None]


async def test_a_verdict_without_envelope_still_is_one(connect: Connect) -> None:
    """A proxy's bare 413 is TooLarge all the same."""
    with pytest.raises(TooLarge, match="HTTP 413"):
        await ask(connect(says(413, b"<html>")))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[1]", b'{"value": "many"}', b'{"value": NaN}', b"\xff\xfe", b'{"other": 1}']
)
async def test_an_answer_that_cannot_be_read_is_the_peers_failure(connect: Connect, body: bytes) -> None:
    """Garbage with status 200 is DependencyUnavailable and counts against the peer."""
    client = connect(says(200, body), breaker={"min_calls": 2})
    with pytest.raises(DependencyUnavailable, match="cannot be read"):
        await ask(client)
    assert client.breaker.state == "open"


async def test_the_deadline_and_the_request_id_travel(peer: Peer, connect: Connect) -> None:
    """The peer is told how many milliseconds are left, and the id of the request it works for."""
    with structlog.contextvars.bound_contextvars(request_id="abc-1"):
        await ask(connect(), deadline=Deadline.after(2.0))
    headers = peer.requests[0].headers
    assert headers["x-request-id"] == "abc-1"
    assert 1000 < int(headers["x-deadline-ms"]) <= 2000


async def test_without_deadline_and_request_id_no_header_is_sent(peer: Peer, connect: Connect) -> None:
    """A call that may take for ever, made for no request, says nothing of either."""
    await ask(connect(), deadline=NO_DEADLINE)
    assert not {"x-deadline-ms", "x-request-id"} & set(peer.requests[0].headers)


async def test_the_peer_may_be_told_to_answer_earlier(peer: Peer, connect: Connect) -> None:
    """With answer_by the peer hears of less time than the caller waits."""
    deadline = Deadline.after(20.0)
    await ask(connect(), deadline=deadline, answer_by=deadline.earlier(15.0))
    assert int(peer.requests[0].headers["x-deadline-ms"]) <= 5000


@pytest.mark.parametrize("slow", [hangs, drips], ids=["hangs", "drips"])
async def test_a_slow_peer_is_left_at_the_deadline(peer: Peer, connect: Connect, slow: Answer) -> None:
    """The deadline holds for the whole answer; the connection is closed then, and the peer not asked again."""
    with pytest.raises(DeadlineExceeded, match="did not answer in time"):
        await ask(connect(slow), deadline=Deadline.after(0.05))
    async with asyncio.timeout(5):
        while not peer.gone:
            await asyncio.sleep(0.001)
    assert len(peer.requests) == 1


async def test_the_peers_own_time_out_is_deadline_exceeded(peer: Peer, connect: Connect) -> None:
    """A 504 of the peer means that the time ran out there, and is not retried."""
    with pytest.raises(DeadlineExceeded):
        await ask(connect(refusal(504)))
    assert len(peer.requests) == 1


async def test_an_open_breaker_refuses_without_a_call(peer: Peer, connect: Connect) -> None:
    """A peer that keeps failing is left alone: the call that opens the breaker is the last one made."""
    client = connect(refusal(500))
    for _ in range(2):
        with pytest.raises(DependencyUnavailable):
            await ask(client)
    assert client.breaker.state == "open"
    assert len(peer.requests) == 3
    with pytest.raises(DependencyUnavailable, match="paused"):
        await ask(client)
    assert len(peer.requests) == 3


async def test_after_the_pause_the_peer_is_tried_again(peer: Peer, connect: Connect) -> None:
    """Once the pause is over a call that goes well closes the breaker."""
    client = connect(refusal(500), breaker={"reset_s": 0.0})
    for _ in range(2):
        with pytest.raises(DependencyUnavailable):
            await ask(client)
    peer.answers = [good()]
    assert await ask(client) == Reply(value=7)
    assert client.breaker.state == "closed"


async def test_a_cancelled_call_is_no_failure(peer: Peer, connect: Connect) -> None:
    """Callers that go away do not open the breaker for the others, and the peer sees them go."""
    client = connect(hangs, breaker={"min_calls": 1})
    task = asyncio.create_task(ask(client))
    async with asyncio.timeout(5):
        while not peer.requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not peer.gone:
            await asyncio.sleep(0.001)
    assert client.breaker.state == "closed"


async def test_hasty_callers_do_not_open_the_breaker(connect: Connect) -> None:
    """A call that was given too little time is late, and says nothing against the peer."""
    client = connect(after(0.2, good()))
    for _ in range(6):
        with pytest.raises(DeadlineExceeded):
            await ask(client, deadline=Deadline.after(0.01))
    assert client.breaker.state == "closed"


async def test_slow_answers_count_unless_they_are_bulk_or_work(connect: Connect) -> None:
    """Answers over slow_s open the breaker, but not those to bulk work, nor time that was work."""
    client = connect(after(0.03, good()), slow_s=0.02)
    for _ in range(4):
        await ask(client, bulk=True)
        await ask(client, work_s=lambda _reply: 10.0)
    assert client.breaker.status.failures == 0
    for _ in range(8):
        await ask(client)
        if client.breaker.state == "open":
            break
    assert client.breaker.state == "open"


async def test_the_slots_bound_what_is_under_way(peer: Peer, connect: Connect) -> None:
    """What finds all slots taken waits for a share of its time, and is then overloaded; the breaker hears nothing."""
    client = connect(hangs, max_calls=2)
    held = [asyncio.create_task(ask(client)) for _ in range(2)]
    async with asyncio.timeout(5):
        while len(peer.requests) < 2:
            await asyncio.sleep(0.001)
        with pytest.raises(Overloaded, match="2 calls under way"):
            await ask(client, deadline=Deadline.after(0.1))
        waiting = [asyncio.create_task(ask(client)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await ask(client)
        for task in (*held, *waiting):
            task.cancel()
        await asyncio.wait({*held, *waiting})
        peer.answers = [good()]
        assert await ask(client) == Reply(value=7)
    assert client.breaker.status.failures == 0


async def test_bulk_work_leaves_slots_free(peer: Peer, connect: Connect) -> None:
    """Bulk calls that hang take three quarters of the slots, and what somebody waits for goes through."""
    client = connect(hangs, max_calls=4)
    bulk = [asyncio.create_task(ask(client, bulk=True)) for _ in range(4)]
    async with asyncio.timeout(5):
        while len(peer.requests) < 3:
            await asyncio.sleep(0.001)
        peer.answers = [good()]
        assert await ask(client) == Reply(value=7)
        assert len(peer.requests) == 4
        for task in bulk:
            task.cancel()
        await asyncio.wait(bulk)


# --- a peer with several addresses


async def two_peers(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> tuple[Peer, Peer]:
    """Return two peers that one name stands for."""
    first = Peer([answers[0]])
    await first.start()
    second = Peer([answers[1]], host="127.0.0.2", port=first.port)
    await second.start()

    async def resolve(_host: str, _port: int) -> tuple[str, ...]:
        return ("127.0.0.1", "127.0.0.2")

    monkeypatch.setattr(addresses, "resolve", resolve)
    return first, second


async def test_the_address_with_the_fewest_calls_in_flight_is_asked(monkeypatch, connect: Connect) -> None:
    """While one address is busy the other gets all the calls."""
    first, second = await two_peers(monkeypatch, hangs, hangs)
    client = connect(url=f"http://peers:{first.port}")
    held = asyncio.create_task(ask(client))
    async with asyncio.timeout(5):
        while not (first.requests or second.requests):
            await asyncio.sleep(0.001)
        idle = second if first.requests else first
        idle.answers = [good()]
        for _ in range(10):
            assert await ask(client) == Reply(value=7)
    assert len(idle.requests) == 10
    assert idle.requests[0].headers["host"] == f"peers:{first.port}"
    held.cancel()
    await asyncio.wait({held})
    await first.stop()
    await second.stop()


async def test_an_address_that_fails_is_put_aside_and_tried_again(monkeypatch, connect: Connect) -> None:
    """Calls go to the other one, no caller sees the failure, the breaker stays closed; back again, it is used."""
    first, second = await two_peers(monkeypatch, refusal(503), good())
    client = connect(url=f"http://peers:{first.port}")
    for _ in range(30):
        assert await ask(client) == Reply(value=7)
    assert 1 <= len(first.requests) <= 3
    assert client.breaker.status.failures == 0
    first.answers = [good()]
    async with asyncio.timeout(5):
        while len(first.requests) < 3:
            await ask(client)
    await first.stop()
    await second.stop()


async def test_a_name_that_does_not_resolve_is_unavailable_at_once(connect: Connect) -> None:
    """No call hangs in the resolver."""
    client = connect(url="http://nowhere.invalid:1")
    for _ in range(3):
        with pytest.raises(DependencyUnavailable):
            await ask(client)
