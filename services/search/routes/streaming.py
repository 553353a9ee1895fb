"""Bodies that are read piece by piece, and replies that are written while they are."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.types import Receive, Scope, Send

from services.common.direct_routes import validated
from services.common.errors import Malformed, TercetError
from services.common.headers import header
from services.common.http_errors import error_body, from_validation, status_of
from services.common.wire.documents import MSGPACK, NDJSON, WriteProgress
from services.common.wire.search import SearchRequest
from services.search.ingest import Totals
from services.search.streams import read_msgpack, read_ndjson

STREAMS = {NDJSON: read_ndjson, "application/ndjson": read_ndjson, MSGPACK: read_msgpack}

Write = Callable[[Callable[[Totals], None] | None], Awaitable[Totals]]


def content_type(scope: Scope) -> str:
    """Return what a request's body is, without parameters; empty where it does not say."""
    return (header(scope, b"content-type") or b"").decode("latin-1").split(";")[0].strip().lower()


def read_searches(body: bytes) -> Iterator[SearchRequest | TercetError]:
    """Yield what each line of *body* asks, or what is wrong with it, as it is asked for; blank lines are passed over."""
    for line in BytesIO(body):
        if line.strip():
            yield _read_search(line)


def _read_search(line: bytes) -> SearchRequest | TercetError:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Malformed(f"The line is not valid JSON: {error.msg}")
    if not isinstance(value, dict):
        return Malformed("The line is not a JSON object")
    try:
        return validated(SearchRequest, value)
    except RequestValidationError as error:
        return from_validation(error)


def wants_lines(request: Request) -> bool:
    """Whether the caller takes NDJSON."""
    return "ndjson" in request.headers.get("accept", "")


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """Yield the body as it arrives. Raises Malformed where the caller goes before its end."""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Malformed("The request ended before its body did", param="body")
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


async def summary(write: Write, name: str, request_id: str | None) -> Response:
    """Do *write* and return one reply at its end, with the status of what ended it early."""
    totals = await write(None)
    reply = _progress(name, totals, 0, request_id, done=totals.error is None)
    status = 200 if totals.error is None else status_of(totals.error)
    if totals.error is None and totals.failed and not totals.accepted:
        status = refused_status(totals.errors[0].code)
    return Response(reply.model_dump_json(exclude_none=True), status, media_type="application/json")


def refused_status(code: str) -> int:
    """Return the status of a write of which nothing was accepted, by the code of its first error."""
    return 409 if code == "conflict" else 422


class ProgressResponse(Response):
    """
    A line of NDJSON after each batch of a write, and a last one at its end.

    Writing never holds up reading: lines that a slow reader leaves waiting are joined into one.
    """

    def __init__(self, write: Write, name: str, request_id: str | None) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._write = write
        self._name = name
        self._request_id = request_id
        self._totals: Totals | None = None
        self._news = asyncio.Event()
        self._told = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do the write and answer."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing: asyncio.Task[Totals] = asyncio.ensure_future(self._write(self._tell))
        writing.add_done_callback(lambda _: self._news.set())
        try:
            while not writing.done():
                await self._news.wait()
                self._news.clear()
                if self._totals is not None and not writing.done():
                    await self._send(send, self._totals)
            totals = writing.result()
            await self._send(send, totals, done=totals.error is None)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if not writing.done():
                writing.cancel()
                with suppress(asyncio.CancelledError):
                    await writing

    def _tell(self, totals: Totals) -> None:
        self._totals = totals
        self._news.set()

    async def _send(self, send: Send, totals: Totals, **more: Any) -> None:
        line = _progress(self._name, totals, self._told, self._request_id, **more)
        self._told = len(totals.errors)
        body = line.model_dump_json(exclude_none=True).encode() + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _progress(name: str, totals: Totals, told: int, request_id: str | None, *, done: bool = False) -> WriteProgress:
    """Return how a stream stands, with the errors from the one numbered *told* on."""
    return WriteProgress(
        collection=name,
        accepted=totals.accepted,
        unchanged=totals.unchanged,
        embedded=totals.embedded,
        seq=totals.seq,
        applied=totals.applied,
        failed=totals.failed,
        errors=totals.errors[told:],
        batches=totals.batches,
        done=done,
        error=None if totals.error is None or done else error_body(totals.error, request_id),
    )
