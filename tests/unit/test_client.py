"""TercetClient against a tiny ASGI app: what it sends, what it makes of answers, and how it indexes."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx2
import orjson
import pytest

from services.common.wire.documents import Document
from tercet.client import (
    IndexingFailed,
    IndexSummary,
    TercetApiError,
    TercetClient,
    TercetClientError,
    TercetUnreachable,
)
from tercet.ingest import DocumentDict

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Service:
    """An ASGI app that records requests and answers as *answer* says."""

    def __init__(self, answer: Callable[[str, str, Any], Awaitable[Answer]]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["raw_path"].decode()
        query = scope["query_string"].decode()
        parsed = orjson.loads(body) if body else None
        self.requests.append((scope["method"], f"{path}?{query}" if query else path, parsed))
        status, reply, *headers = await self.answer(scope["method"], path, parsed)
        raw = [(name.encode(), value.encode()) for name, value in (headers[0] if headers else {}).items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": reply if isinstance(reply, bytes) else orjson.dumps(reply)})

    def client(self) -> TercetClient:
        return TercetClient("http://search", transport=httpx2.ASGITransport(app=self))


def refusal(code: str, *, retryable: bool = False, param: str | None = None) -> dict[str, Any]:
    error = {"code": code, "message": "no", "type": "t", "param": param, "retryable": retryable, "request_id": "r1"}
    return {"error": error}


def written(body: Any, *, unchanged: int = 0) -> dict[str, Any]:
    count = len(body["documents"])
    reply = {"collection": "c", "accepted": count, "unchanged": unchanged, "embedded": count - unchanged}
    return {**reply, "seq": int(body["documents"][-1]["id"].strip("d")), "applied": True}


def documents(count: int) -> list[DocumentDict]:
    return [DocumentDict(id=f"d{number}", text=f"text {number}", metadata={}) for number in range(count)]


SEARCH_REPLY = {
    "collection": "c",
    "hits": [{"id": "a", "score": 1.0, "score_kind": "fused", "stages": {"fused": 1.0}}],
    "coverage": {"ratio": 1.0, "shards": {"total": 1, "ok": 1}},
    "degraded": [],
    "pipeline": {"retrieval": "hybrid"},
    "cache": {"hit": False},
    "as_of": 3,
    "timings_ms": {"total": 1.5},
}


async def test_search_sends_only_what_was_said() -> None:
    """Fields that are None are left to the service's defaults; the reply comes typed."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 200, SEARCH_REPLY

    service = Service(answer)
    async with service.client() as client:
        reply = await client.search(query="q", collection=None, k=3, include={"text"})
    assert service.requests == [("POST", "/search", {"query": "q", "k": 3, "include": ["text"]})]
    assert reply.hits[0].id == "a"


async def test_the_key_goes_with_every_request() -> None:
    """As a bearer token; without a key there is no such header, and a 401 says how to give one."""
    seen: list[str | None] = []

    async def guarded(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("authorization"))
        return httpx2.Response(200, json=SEARCH_REPLY) if seen[-1] else httpx2.Response(401, json=refusal("x"))

    async with TercetClient("http://search", api_key="k", transport=httpx2.MockTransport(guarded)) as client:
        await client.search(query="q")
    async with TercetClient("http://search", transport=httpx2.MockTransport(guarded)) as client:
        with pytest.raises(TercetApiError, match="--api-key or TERCET_API_KEY"):
            await client.search(query="q")
    assert seen == ["Bearer k", None]


async def test_an_error_answer_is_raised_with_all_it_says() -> None:
    """The envelope's fields are the exception's."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 429, refusal("overloaded", retryable=True, param="k"), {"retry-after": "2"}

    async with Service(answer).client() as client:
        with pytest.raises(TercetApiError) as caught:
            await client.search(query="q")
    error = caught.value
    assert (error.status, error.code, error.message, error.param) == (429, "overloaded", "no", "k")
    assert (error.request_id, error.retryable, error.retry_after_s) == ("r1", True, 2.0)
    assert str(error) == "no (HTTP 429, request r1)"


@pytest.mark.parametrize("status", [200, 404, 502])
async def test_answers_of_something_else_are_errors_too(status: int) -> None:
    """Many things listen on port 8000, and not all are Tercet."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return status, b"<html>hello</html>"

    async with Service(answer).client() as client:
        with pytest.raises(TercetApiError, match="http://search"):
            await client.status()
        if status == 404:
            with pytest.raises(TercetApiError):
                await client.find_collection("c")


async def test_names_are_quoted_in_paths() -> None:
    """An id may hold anything, a slash and a question mark too."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 200, {"id": "a/b?c#1", "text": "t"}

    service = Service(answer)
    async with service.client() as client:
        await client.get_document("c", "a/b?c#1")
    assert service.requests[0][1] == "/collections/c/documents/a%2Fb%3Fc%231"


async def test_a_collection_that_is_not_there_is_found_to_be_none() -> None:
    """Only that very answer counts as absence."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 404, refusal("not_found")

    async with Service(answer).client() as client:
        assert await client.find_collection("c") is None
        with pytest.raises(TercetApiError):
            await client.collection("c")


async def test_a_refused_connection_says_what_to_do() -> None:
    """Nothing is retried when nothing ever listened."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        async with TercetClient(url) as client:
            with pytest.raises(TercetUnreachable, match=rf"{url}.*tercet up") as caught:
                await client.index("c", documents(3))
            assert caught.value.refused
            assert not await client.ready()


async def test_what_is_no_json_and_no_address_is_said() -> None:
    """Errors that never reach the wire are of the client's own kind."""
    with pytest.raises(TercetClientError, match="not an http address"):
        TercetClient("http://127.0.0.1:9:9")
    async with TercetClient("nonsense") as client:
        with pytest.raises(TercetClientError, match="not an http address"):
            await client.status()
    async with TercetClient() as client:
        with pytest.raises(TercetClientError, match="JSON"):
            await client.search(query="\ud800")


async def test_index_batches_in_order_and_adds_up() -> None:
    """Batches are full but for the last, start in order, and the callback sees the running totals."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 200, written(body, unchanged=1)

    service, seen = Service(answer), []
    async with service.client() as client:
        summary = await client.index(
            "c", documents(10), batch_size=4, on_batch=lambda total: seen.append(total.documents)
        )
    assert [request[1] for request in service.requests] == ["/collections/c/documents?wait=applied"] * 3
    batches = [[document["id"] for document in request[2]["documents"]] for request in service.requests]
    assert batches == [["d0", "d1", "d2", "d3"], ["d4", "d5", "d6", "d7"], ["d8", "d9"]]
    assert (summary.documents, summary.unchanged, summary.embedded, summary.batches, summary.seq) == (10, 3, 7, 3, 9)
    assert seen[-1] == 10


async def test_index_reads_no_further_than_it_writes() -> None:
    """A corpus larger than memory can be indexed: with two writes stuck, one more batch is read and no more."""
    release = asyncio.Event()
    read = 0

    def endless() -> Iterator[DocumentDict]:
        nonlocal read
        for document in documents(1000):
            read += 1
            yield document

    async def answer(method: str, path: str, body: Any) -> Answer:
        await release.wait()
        return 200, written(body)

    service = Service(answer)
    async with service.client() as client:
        indexing = asyncio.create_task(client.index("c", endless(), batch_size=10, concurrency=2))
        await asyncio.sleep(0.3)
        # A batch is known to be full once the document after it is read.
        assert (read, len(service.requests)) == (31, 2)
        release.set()
        assert (await indexing).documents == 1000


async def test_an_id_that_comes_again_is_written_after_the_first() -> None:
    """The later document must win, so two batches with one id are never under way together."""
    under_way = 0

    async def answer(method: str, path: str, body: Any) -> Answer:
        nonlocal under_way
        under_way += 1
        assert under_way == 1
        await asyncio.sleep(0.02)
        under_way -= 1
        return 200, written(body)

    same = [Document(id="d1", text=f"version {number}") for number in range(4)]
    service = Service(answer)
    async with service.client() as client:
        await client.index("c", same)
    texts = [[document["text"] for document in request[2]["documents"]] for request in service.requests]
    assert texts == [["version 0"], ["version 1"], ["version 2"], ["version 3"]]


async def test_a_busy_service_is_tried_again() -> None:
    """429 and 503 are retried until they pass; nothing is lost or written out of its batch."""
    refused = 0

    async def answer(method: str, path: str, body: Any) -> Answer:
        nonlocal refused
        if refused < 2:
            refused += 1
            return (429, 503)[refused % 2], refusal("overloaded", retryable=True)
        return 200, written(body)

    service = Service(answer)
    async with service.client() as client:
        summary: IndexSummary = await client.index("c", documents(5), batch_size=5)
    assert summary.documents == 5
    assert len(service.requests) == 3


async def test_patience_ends() -> None:
    """A service that stays busy is given up on, with the batch's ids."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 503, refusal("not_ready", retryable=True)

    async with Service(answer).client() as client:
        with pytest.raises(IndexingFailed, match="'d0' to 'd2'") as caught:
            await client.index("c", documents(3), retry_for_s=0.4)
    assert isinstance(caught.value.error, TercetApiError)


async def test_a_refused_document_is_named() -> None:
    """A caller's error is not retried; it has the batch's first and last id, and the document at fault."""

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 422, refusal("invalid_input", param="documents.1.text")

    service = Service(answer)
    async with service.client() as client:
        with pytest.raises(IndexingFailed, match="document 'd1' was refused") as caught:
            await client.index("c", documents(3))
    assert (caught.value.first_id, caught.value.last_id, caught.value.ids) == ("d0", "d2", ("d1",))
    assert len(service.requests) == 1


async def test_an_error_of_the_source_comes_through() -> None:
    """What reading raises is raised as it is, not in a group."""

    def broken() -> Iterator[DocumentDict]:
        yield from documents(2)
        raise LookupError("line 3")

    async def answer(method: str, path: str, body: Any) -> Answer:
        return 200, written(body)

    async with Service(answer).client() as client:
        with pytest.raises(LookupError, match="line 3"):
            await client.index("c", broken(), batch_size=1)
